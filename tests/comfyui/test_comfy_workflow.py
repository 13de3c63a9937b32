"""The example workflow: its node is as the schema has it, and every link fits."""

import asyncio
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui" / "workflows"


def test_the_example_fits_the_node(pack):
    (node,) = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    schema = node.GET_SCHEMA()
    for path in FOLDER.glob("*.json"):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        nodes = {x["id"]: x for x in workflow["nodes"]}
        for id, start, out, end, place, kind in workflow["links"]:
            assert id in nodes[start]["outputs"][out]["links"]
            assert (
                nodes[end]["inputs"][place] | {"link": id, "type": kind}
                == (nodes[end]["inputs"][place])
            )
        (ours,) = (x for x in nodes.values() if x["type"] == schema.node_id)
        sockets = [x["name"] for x in ours["inputs"]]
        assert sockets == ["model", "negative"]
        widgets = [x for x in schema.inputs if x.id not in sockets]
        assert len(widgets) == len(ours["widgets_values"])
        for widget, value in zip(widgets, ours["widgets_values"], strict=True):
            assert type(value) is type(widget.default)
            assert value in (getattr(widget, "options", None) or [value])
        sampler = next(x for x in nodes.values() if x["type"] == "KSampler")
        # cfg 1: the negative prompt acts through the node alone
        assert sampler["widgets_values"][3] == 1.0
