"""The start token's key and value of causal text towers become float constants."""

from collections.abc import Sequence
from dataclasses import dataclass

from lit_clipq.calibration.needs import Need, Write
from lit_clipq.nn.start_token import StartTokenAverage, StartTokenScores
from lit_clipq.nn.swap import Layer, QuantizationMap
from lit_clipq.stages.draft import Draft
from lit_clipq.stages.stage import GridStage, Report, stage


def start_products(plan: QuantizationMap, layers: Sequence[Layer], *, text_rule: bool) -> list[str]:
    """Name the products that keep the start token's key or value: all those of the text tower, or none.

    If one were left out, the start token would have to pass through grids that never saw it.

    Args:
        plan: What is to become of each layer.
        layers: The quantizable layers.
        text_rule: Whether the text tower is causal and pooled at its end token.
    """
    if not text_rule:
        return []
    text = [layer for layer in layers if layer.tower == "text" and layer.kind.is_product_of_activations]
    names = [layer.name for layer in text]
    return names if {entry.name for entry in plan.quantized}.issuperset(names) else []


@stage("start_tokens")
@dataclass(frozen=True)
class StartTokens(GridStage):
    """Keep what the attention products of a causal text tower see of the first position in float, as constants.

    In such a tower it is the same for every text, and an outlier that would stretch every range. Positions from the
    second one on are quantized with grids that never saw it. Other text towers are left alone.
    """

    needs = frozenset({Need.START, Need.SOURCES})
    reads = frozenset({Write.GRIDS})
    writes = frozenset({Write.STRUCTURE})
    forbids = frozenset({"ranges", "search"})

    def assign(self, draft: Draft) -> Report:
        """Give the products their constants; the report says how many there are, or why there are none."""
        session = draft.session
        names = start_products(draft.plan, session.layers, text_rule=session.text_rule)
        averages = session.sources.averages
        for name in names:
            module = draft.modules[name]
            kind = StartTokenAverage if name in averages else StartTokenScores
            kept = kind(session.layer[name].module, *module.quantizers)
            kept.register_buffer("constant", draft.start(name))
            kept.rivals = module.rivals
            draft.modules[name] = kept
        if names:
            return {"products": len(names)}
        reason = "not all products of the text tower are quantized" if session.text_rule else "no causal text tower"
        return {"products": 0, "reason": reason}
