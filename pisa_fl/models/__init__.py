"""Models, one target for each `conf/model/<name>.yaml`.

Each is called with `shape`, (channels, height, width) of the images, and `classes`, their number, beside
the numbers of its yaml, and is an `nn.Module` that maps (B, channels, height, width) to logits
(B, classes). Parameters are drawn from torch's global generator. A model of your own is named by
`_target_` in a yaml of yours; write it without in-place operations, so that `torch.func.vmap` can run it
for many clients at once.
"""
