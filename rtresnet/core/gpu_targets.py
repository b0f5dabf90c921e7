"""Map the usual names of GPUs to targets: "RTX 4090" is sm_89.

Compute capabilities as NVIDIA publishes them (developer.nvidia.com/cuda-gpus). Patterns of names,
so that the table need not list every board; the first match counts.
"""

from __future__ import annotations

import re

# The targets of TensorRT-RTX 1.7, in the order of the bits of a plan's header.
SERVED = {
    "sm_75": "RTX 20, T4",
    "sm_80": "A100, A30",
    "sm_86": "RTX 30, A10, A40",
    "sm_89": "RTX 40, L4, L40",
    "sm_120": "RTX 50",
    "sm_121": "GB10",
}
# Targets that it does not have, and names of GPUs.
UNSERVED = {
    "sm_87": "Jetson Orin",
    "sm_90": "H100, H200",
    "sm_100": "B100, B200",
    "sm_103": "B300",
    "sm_110": "Jetson Thor",
}
OLD = "sm_70 and older: V100, P100, GTX 10"

NAMES = (
    (r"rtx pro \d000( blackwell)?|rtx pro 4500", "sm_120"),
    (r"(rtx )?(\d000|500|3500|4500|5880)( sff)? ada|rtx 5880", "sm_89"),
    (r"rtx a[1-6]000|rtx a(4|5)500|rtx a\d00|(rtx )?2050", "sm_86"),  # a 2050 is an Ampere
    (r"(quadro )?rtx (3|4|5|6|8)000", "sm_75"),
    (r"(rtx )?50[5-9]0|rtx 50", "sm_120"),
    (r"(rtx )?40[5-9]0|rtx 40", "sm_89"),
    (r"(rtx )?30[5-9]0|rtx 30", "sm_86"),
    (r"(rtx )?20[5-8]0|rtx 20|gtx 16\d\d|titan rtx|t4g?|t(4|5|6|10)00|turing", "sm_75"),
    (r"gb10|dgx spark", "sm_121"),
    (r"g?b300", "sm_103"),
    (r"b100|g?b200", "sm_100"),
    (r"gh200|h20|h[128]00|hopper", "sm_90"),
    (r"l4|l40s?|l20|l2|ada", "sm_89"),
    (r"a100x?|a30x?|a800", "sm_80"),
    (r"a10g?|a16|a40|a2", "sm_86"),
    (r".*orin.*", "sm_87"),
    (r".*thor.*", "sm_110"),
    (r"v100s?|titan v|volta", "sm_70"),
    (r"p100|p40?|p6|gtx 10\d0|titan xp?|pascal", "sm_61"),
)
# Text before and after the name: NVIDIA A100-SXM4-80GB, NVIDIA GeForce RTX 4090 Laptop GPU.
VENDOR = re.compile(r"^(nvidia|tesla|geforce|graphics|nvidia corporation)\s+", re.IGNORECASE)
REST = re.compile(
    r"[\s-]*((laptop|mobile|max-q|gpu|ti|super|pcie|sxm\d?|nvl?|generation|workstation|server|edition"
    r"|tensor|core|with|design|d|\d+ ?gb|hbm\d?e?)\b[\s-]*)*$",
    re.IGNORECASE,
)


def target_of(name: str) -> str | None:
    """Return the compute capability of a GPU, as in sm_89; None if the name is not in the table."""
    text = " ".join(name.replace("_", " ").split()).lower()
    while (shorter := VENDOR.sub("", text)) != text:
        text = shorter
    text = re.sub(r"(?<=[a-z])-(?=\d)", " ", text)
    text = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super)\b", r" \1", text)
    for candidate in (text, REST.sub("", text)):
        for pattern, target in NAMES:
            if re.fullmatch(pattern, candidate):
                return target
    return None


def names() -> list[str]:
    """Return the names of the GPUs and series that TensorRT-RTX builds for."""
    return [name for listed in SERVED.values() for name in listed.split(", ")]


def served_by_rtx(target: str) -> bool:
    """Return whether TensorRT-RTX builds for a compute capability (not for H100, H200: sm_90)."""
    return target in SERVED


def too_old(target: str) -> bool:
    """Return whether neither TensorRT-RTX nor TensorRT 11 supports a target: below 7.5."""
    return int(target.removeprefix("sm_")) < 75
