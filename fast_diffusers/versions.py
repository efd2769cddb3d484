"""Installed versions against those this package requires."""

from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "fast-diffusers"
STAND_INS = {"paddlepaddle": ("paddlepaddle", "paddlepaddle-gpu")}
"""Distributions that provide the same package; any of them meets the requirement."""


def requirements() -> list[Requirement]:
    """What the installed distribution requires without extras; empty if it is not installed (a bare checkout)."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in lines]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed(name: str) -> dict[str, str]:
    """Version by distribution name, of `name` and its stand-ins that are installed."""
    found = {}
    for candidate in STAND_INS.get(name, (name,)):
        try:
            found[candidate] = metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return found


def problem(requirement: Requirement) -> str | None:
    """What is wrong with the installed version, in a few words; None if it fits."""
    found = installed(requirement.name)
    if not found:
        return f"{requirement.name} is not installed, needs {requirement.specifier or 'any version'}"
    for name, version in found.items():
        if not requirement.specifier.contains(version, prereleases=True):
            return f"{name} is {version}, needs {requirement.specifier}"
    return None


def problems() -> list[str]:
    """`problem` of every requirement that has one."""
    return [text for requirement in requirements() if (text := problem(requirement))]
