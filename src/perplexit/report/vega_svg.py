"""A Vega-Lite specification → an SVG element of the page."""

import re
from typing import Any

from perplexit.report.report_packages import loaded

VEGA_LITE = "5.21"
# Fonts of equal widths on every system: labels are laid out here and drawn by the reader's browser
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
_NOT_DRAWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\u2028\u2029\ud800-\udfff\ufffe\uffff]")

Spec = dict[str, Any]


def drawn(spec: Spec) -> str:
    """Return a Vega-Lite chart as an SVG element that scales with the page.

    Raises MissingPackageError without the extra `report`.
    """
    svg: str = loaded("vl_convert").vegalite_to_svg(
        _drawable({"background": "transparent", "config": _config(), **spec}),
        vl_version=VEGA_LITE,
        allowed_base_urls=[],  # a drawing fetches nothing
    )
    root = re.match(r"<svg[^>]*>", svg)
    width, height = re.findall(r' (?:width|height)="([\d.]+)"', root[0])[:2] if root else ("", "")
    opening = f'<svg class="chart" viewBox="0 0 {width} {height}" role="group">'
    return opening + svg[root.end() :] if root else svg


def _drawable(value: Any) -> Any:
    """Return the same with characters that XML or the drawing's script cannot hold written out."""
    if isinstance(value, str):
        return _NOT_DRAWABLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list | tuple) else value


def _config() -> Spec:
    return {
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "titleColor": "var(--muted)",
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "titlePadding": 10,
            "labelFlush": False,
            "labelOverlap": "greedy",
            "tickCount": 5,
            "labelFontSize": 12,
            "gridColor": "var(--rule)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "labelLimit": 150,
        },
        "legend": {
            "labelColor": "var(--ink)",
            "labelFontSize": 12,
            "symbolStrokeWidth": 2,
            "symbolType": "stroke",
            "symbolBaseStrokeColor": "var(--muted)",
            "symbolSize": 260,
            "orient": "top",
            "title": None,
            "labelLimit": 180,
            "columns": 3,
        },
        "text": {"color": "var(--ink)", "fontSize": 12},
        "rule": {"color": "var(--line)"},
    }
