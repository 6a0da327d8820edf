"""Recipes of earlier versions. In csq 0.1 all methods shared one bag of settings and had other names:

    csq         → staged       (the default then, without bit gates)
    csq-paper   → csq          (with the paper's settings, unless the recipe says otherwise)
    csq-uniform → csq-uniform

A recipe is of that kind when it names `csq-paper` or has one of the old keys; the complete recipe in an old file always has
all of them. Without old keys, `csq` means what it means today.

In 0.2 gates had one scale per layer and no limit, levels of `parq` were the least-squares distance apart, and scales of `staged` stood
still: a section of such a method that has every key of then, as complete recipes in files and run folders do, keeps that meaning.
"""

from __future__ import annotations

from typing import Any

from csqcli.quant.catalog import CARDS
from csqcli.quant.method_settings import PAPER

_STAGED = {
    "search_share": "search_share",
    "soft_share": "soft_share",
    "mask_beta_initial": "beta_initial",
    "mask_beta_final": "beta_final",
    "latent_lr": "latent_lr",
    "recovery": "recovery",
    "per_channel": "per_channel",
}
_GATES = ("beta_initial", "beta_final", "beta_schedule", "logit", "refit_scale", "rounding", "harden_at")
_SEARCHING_GATES = (*_GATES, "reg_strength", "mask_logit")
_SINCE_0_2: dict[str, Any] = {  # what gate methods did in 0.2
    "per_channel": False,
    "gate_limit": None,
    "straight_through_at": None,
    "straight_through_rate": 1.0,
}
_PARQ_SINCE_0_2: dict[str, Any] = {"step_factor": 1.0}
_STAGED_SINCE_0_2: dict[str, Any] = {"step_factor": 1.0, "scale_lr": 0.0}
_THEN: dict[str, Any] = {  # what they did before they had a setting for it
    "digits": "sign-magnitude",
    "init_scale": 1.0,
    "gate_steps": "sgd",
    "restart_beta": None,
    "fix_masks_at": 1.0,
    **_SINCE_0_2,
}
_ADDED_SINCE_0_2 = {
    "csq": _SINCE_0_2,
    "csq-uniform": _SINCE_0_2,
    "parq": _PARQ_SINCE_0_2,
    "staged": _STAGED_SINCE_0_2,
}
OLD_KEYS = frozenset((*_STAGED, *_SEARCHING_GATES))
_NEW_NAMES = {"csq": "staged", "csq-paper": "csq"}


def modernised(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe's raw mapping in today's names; the same mapping where it is of today already."""
    return _as_in_0_2(_as_in_0_1(raw))


def _as_in_0_2(raw: dict[str, Any]) -> dict[str, Any]:
    complete = {}
    for name, since in _ADDED_SINCE_0_2.items():
        section = raw.get(name)
        if isinstance(section, dict) and section.keys() == CARDS[name].settings.model_fields.keys() - since.keys():
            complete[name] = section | since
    return raw | complete


def _as_in_0_1(raw: dict[str, Any]) -> dict[str, Any]:
    old = raw.get("quantization")
    if not isinstance(old, dict):
        return raw
    keys = OLD_KEYS & old.keys()
    named = old.get("method", "csq" if keys else None)
    if not keys and named != "csq-paper":
        return raw
    method = _NEW_NAMES.get(named, named) if isinstance(named, str) else named
    complete = keys == OLD_KEYS  # written by csq: what belongs to other methods is there by default only
    sections: dict[str, dict[str, Any]] = {}
    for key in sorted(keys):
        for section, name in _homes(key, method):
            if not complete or section == method:
                sections.setdefault(section, {})[name] = old[key]
    if complete and method in ("csq", "csq-uniform"):
        sections[method] |= {key: value for key, value in _THEN.items() if key in CARDS[method].settings.model_fields}
    if complete and method == "staged":
        sections[method] |= _STAGED_SINCE_0_2
    if named == "csq-paper" and not complete:
        sections["csq"] = PAPER | sections.get("csq", {})
    kept = {key: value for key, value in old.items() if key not in keys}
    if method is not None:
        kept["method"] = method
    given = {name: {**section, **_mapping(raw.get(name))} for name, section in sections.items()}
    return raw | {"quantization": kept} | given


def _homes(key: str, method: Any) -> list[tuple[str, str]]:
    """(section, name in it) of an old key: that of the method in use where it takes the key, else that of its owner."""
    if key in _STAGED and key not in _SEARCHING_GATES:
        return [("staged", _STAGED[key])]
    if method == "csq-uniform" and key in _GATES:
        return [("csq-uniform", key)]
    return [("csq", key)]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
