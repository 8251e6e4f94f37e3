"""The published members of PPO's family, each as values of the options of `--ppo.*`: one table, with sources.

What a member leaves open (the price of a nat, where its paper names none that fits every model) is the option's own
default. `docs/grpo.md` shows the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One algorithm."""

    source: str
    """The paper, and where in it."""
    options: Mapping[str, Any]
    """Field of `PPOLossConfig` -> value."""


def _preset(source: str, **options: Any) -> Preset:
    return Preset(source, MappingProxyType(options))


_GROUP: dict[str, Any] = {"advantage": "group_mean", "group_size": 8, "epochs": 1}
_WHOLE: dict[str, Any] = {"surrogate": "reinforce", "averaging": "sum", "epochs": 1}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "ppo": _preset("Schulman et al. 2017 (arXiv 1707.06347), Eq. 7", advantage="gae", clip=0.2, epochs=4),
        "rloo": _preset(
            "Ahmadian et al. 2024 (arXiv 2402.14740), section 3.2", advantage="leave_one_out", group_size=4, **_WHOLE
        ),
        "grpo": _preset(
            "Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), Eqs. 3 and 4, section 4.2",
            **_GROUP,
            scale="group",
            clip=0.2,
            averaging="sequence",
            kl_placement="loss",
            kl_estimator="k3",
            kl_coefficient=0.04,
        ),
        "dr_grpo": _preset(
            "Liu et al. 2025 (arXiv 2503.20783), section 3.2",
            **_GROUP,
            scale="none",
            clip=0.2,
            averaging="constant",
            kl_coefficient=0.0,
        ),
        "dapo": _preset(
            "Yu et al. 2025 (arXiv 2503.14476), section 3",
            **_GROUP,
            scale="group",
            clip_low=0.2,
            clip_high=0.28,
            averaging="group",
            kl_coefficient=0.0,
            zero_variance="resample",
            overlong="ramp",
        ),
        "gspo": _preset(
            "Zheng et al. 2025 (arXiv 2507.18071), Eqs. 5 to 7, section 5.1",
            **_GROUP,
            scale="group",
            ratio="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            averaging="sequence",
            kl_coefficient=0.0,
        ),
        "cispo": _preset(
            "MiniMax-M1 2025 (arXiv 2506.13585), Eqs. 4 and 5; the bound of 5 of ScaleRL (arXiv 2510.13786)",
            **_GROUP,
            scale="group",
            surrogate="cispo",
            clip_low=1.0,
            clip_high=4.0,
            averaging="group",
            kl_coefficient=0.0,
        ),
        "reinforce++": _preset(
            "Hu et al. 2025 (arXiv 2501.03262), section 3",
            advantage="batch_mean",
            scale="batch",
            returns="to_go",
            clip=0.2,
            epochs=1,
        ),
        "remax": _preset("Li et al. 2023 (arXiv 2310.10505), Algorithm 1", advantage="greedy", **_WHOLE),
    }
)

WORDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gae": MappingProxyType({}),
        "rloo": MappingProxyType({"advantage": "leave_one_out", "group_size": 4}),
        "grpo": MappingProxyType({**_GROUP, "scale": "group", "kl_placement": "loss"}),
    }
)
"""What `--ppo.advantage` alone has always meant; `rloo` and `grpo` clip, and average over the mini-batch's tokens."""
