"""Write the files that other programs need to run a bundle."""

from __future__ import annotations

from pathlib import Path

from swin_deploy.option_parsers import BundlePath, bundle_keywords
from swin_deploy.options import PublishSpec


@bundle_keywords(PublishSpec)
def publish(bundle: BundlePath, spec: PublishSpec) -> tuple[Path, ...]:
    """Write a bundle as the files of another program: a model repository, a configuration, an EPContext graph, a web page.

    The folder is written completely or not at all. The bundle does not change.

    Args:
        bundle: Folder of the bundle.
        {options}

    Returns:
        The paths of the files that were written.

    Raises:
        UsageError: The program cannot run what the bundle has, or the folder is not empty.
        BundleError: A file of the bundle is damaged, or the folder cannot be written.

    Example:
        >>> swin_deploy.publish("swinv2-tiny", target="triton", output="repository")
    """
    from swin_deploy.bundle import Bundle
    from swin_deploy.publishing.consumers import publish_bundle

    return publish_bundle(Bundle.open(bundle), spec)
