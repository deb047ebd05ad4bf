"""Charts that draw themselves without a network: what a page and the cell of a notebook need lies in them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from uuid import uuid4

import altair as alt

OPTIONS = {"mode": "vega-lite", "actions": {"export": True, "source": True, "editor": False}}
"""Of `vegaEmbed`: no editor, which lies elsewhere."""

CELL = """<div id="{place}"></div>
<script>if (!window.vegaEmbed) (() => {{ {library} }})();</script>
<script>vegaEmbed("#{place}", {spec}, {options});</script>
"""


@cache
def library() -> str:
    """Vega, Vega-Lite and `vegaEmbed`, which puts charts into a page, as one script."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")


class _Offline(alt.TopLevelMixin):
    """Shows itself in a notebook with all that it needs, unless another renderer of Altair's was chosen there."""

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        if alt.renderers.active != "default":
            return super()._repr_mimebundle_(*args, **kwargs)
        spec = json.dumps(self.to_dict()).replace("<", "\\u003c")
        place = f"chart-{uuid4().hex}"
        return {
            "text/html": CELL.format(place=place, library=library(), spec=spec, options=json.dumps(OPTIONS))
        }


class OfflineChart(_Offline, alt.Chart):
    """One chart."""


class OfflineColumn(_Offline, alt.VConcatChart):
    """Charts, one below the other."""
