"""What `omni profiles` shows: the shipped profiles, or one with every setting it leads to."""

from collections.abc import Iterator, Mapping
from typing import Any

from omni_cli.config import Resolved, Settings, dump_toml
from omni_cli.profiles import (
    Machine,
    Profile,
    default_profile,
    found_accelerator,
    load_profile,
    misfit,
    profile_files,
)
from omni_cli.report import Console

_NOBODY = "nobody yet"


class _Head(Settings):
    """A profile without its recipes' sections."""

    name: str
    summary: str
    run_on: tuple[str, ...]
    machine: Machine


def list_profiles(console: Console) -> dict[str, Any]:
    """Show a table of the shipped profiles; return the same as a JSON-able list."""
    accelerator, memory_gib = found_accelerator()
    default = default_profile()
    rows = []
    for name in profile_files():
        profile = load_profile(name)
        reason = misfit(profile, accelerator, memory_gib)
        rows.append({**_summary(profile), "fits": not reason, "misfit": reason, "default": name == default})
    header = ("profile", "machine", "model", "cameras", "really run on", "fits")
    console.table("Profiles", header, [_cells(row) for row in rows])
    console.say(f"this machine: {accelerator}, {memory_gib:.0f} GiB; without --profile it uses {default}")
    return {"profiles": rows, "accelerator": accelerator, "memory_gib": round(memory_gib, 1)}


def show_profile(profile: Profile, recipes: Mapping[str, Resolved[Any]], console: Console) -> dict[str, Any]:
    """Return one profile with its recipes' settings in full, as values and as TOML whose comments name the origins."""
    reason = misfit(profile, *found_accelerator())
    console.say(f"profile {profile.name} {reason}" if reason else f"profile {profile.name} fits this machine")
    return {
        **_summary(profile),
        "fits": not reason,
        "misfit": reason,
        "recipes": {name: resolved.value.model_dump(mode="json") for name, resolved in recipes.items()},
        "origins": {name: dict(resolved.origins) for name, resolved in recipes.items()},
        "toml": "\n".join(_profile_toml(profile, recipes)),
    }


def _summary(profile: Profile) -> dict[str, Any]:
    head = _Head(**{name: getattr(profile, name) for name in _Head.model_fields})
    sections = profile.model_dump(exclude=set(_Head.model_fields))
    prepared: dict[str, Any] = next((table for table in sections.values() if table), {})
    looks = {"model": prepared.get("model"), "cameras": prepared.get("sample", {}).get("cameras")}
    return {**head.model_dump(mode="json"), **looks}


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    machine = row["machine"]
    name = f"{row['name']} (default)" if row["default"] else row["name"]
    hardware = f"{machine['accelerator']}, {machine['memory_gib']:.0f} GiB, {machine['precision']}"
    return (
        name,
        hardware,
        row["model"],
        row["cameras"],
        ", ".join(row["run_on"]) or _NOBODY,
        "yes" if row["fits"] else "no",
    )


def _profile_toml(profile: Profile, recipes: Mapping[str, Resolved[Any]]) -> Iterator[str]:
    yield dump_toml(_Head(**{name: getattr(profile, name) for name in _Head.model_fields}))
    for name, resolved in recipes.items():
        yield from _recipe_toml(name, resolved)


def _recipe_toml(recipe: str, resolved: Resolved[Any]) -> Iterator[str]:
    yield f"\n[{recipe}]"
    section = ""
    for line in dump_toml(resolved.value).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
            yield f"\n[{recipe}.{section.rstrip('.')}]"
        elif line:
            yield f"{line}  # {resolved.origin_of(section + line.partition(' = ')[0])}"
