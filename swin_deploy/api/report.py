"""Write what is known about a bundle as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import ReportSpec


@dataclass(frozen=True)
class Report:
    """The page that `report` wrote, and the figures that it shows, as JSON values."""

    output: Path
    data: Mapping[str, Any] = field(repr=False)


@bundle_keywords(ReportSpec)
def report(bundle: BundlePath, spec: ReportSpec) -> Report:
    """Write what is known about a bundle as one HTML page, which needs no network.

    The figures are those of `verify`, `evaluate`, `inspect`, `bench` and `tune`, and what `quantize` stored. Figures that the
    bundle does not have are left out, and the page names the command that measures them.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The path of the page, and its figures.

    Raises:
        UsageError: The output exists, or a file of results is invalid.
        InputError: The images cannot be read or do not fit the network.
        BundleError: A file of the bundle is damaged, or the page cannot be written.

    Example:
        >>> swin_deploy.report("swinv2-tiny", output="report.html", data="photos")
    """
    from swin_deploy.bundle import Bundle, write_whole
    from swin_deploy.errors import UsageError
    from swin_deploy.reporting.html_page import page_from_report
    from swin_deploy.reporting.report_data import collect_report

    found, output = Bundle.open(bundle, spec.trust), Path(spec.output)
    if output.is_dir() or (output.exists() and not spec.force):
        raise UsageError(f"{output} exists. Pass --force to replace a file, or choose another name.")
    collected = collect_report(found, spec)
    page = page_from_report(collected)
    write_whole(output, lambda path: path.write_text(page, encoding="utf-8"))
    return Report(output, collected.data)
