"""Models, one target for each `conf/model/<name>.yaml`.

Each is called with `shape`, that of one example's input, and `classes`, how many numbers it gives for each
example or each place of it, beside the numbers of its yaml, and is an `nn.Module` that maps (B, *shape) to
what the task takes: logits (B, classes), or (B, T, classes) for sequences. Parameters are drawn from torch's global
generator. A model of your own is named by `_target_` in a yaml of yours; write it without in-place operations, so that
`torch.func.vmap` can run it for many clients at once.
"""
