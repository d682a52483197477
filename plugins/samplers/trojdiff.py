"""The reverse processes of TrojDiff, which only its attacker runs.

Chen, Song & Li, "TrojDiff: Trojan Attacks on Diffusion Models With Diverse Targets", CVPR 2023, arXiv:2303.05762.
"""

from __future__ import annotations

from harness import TrojanDDIM, TrojanDDPM, hookimpl


@hookimpl
def samplers() -> list[type]:
    return [TrojanDDIM, TrojanDDPM]
