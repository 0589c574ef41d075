"""How fast a public world model is on this machine, as a results file for `lwm bench --page`.

    git clone https://github.com/eloialonso/diamond
    python tools/peers.py diamond --json results/peer_diamond.json
    lwm bench --page results/bench_64.json results/peer_diamond.json

Weights are random: they do not change what a frame costs. Nothing of a peer's code is in this repository.
"""
import argparse
import sys
import time
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from lwm_course import course
from lwm_course.speed import peak_memory_gb, speed_figures


def diamond(checkout: Path):
    "DIAMOND for Atari, 64 x 64 (Alonso et al. 2024, appendix D): four frames seen, U-Net of four levels of 64 channels, three Euler steps."
    if not (checkout / "src/models/diffusion").is_dir(): sys.exit(f"{checkout} is no checkout of DIAMOND: git clone https://github.com/eloialonso/diamond")
    for name, needed in {"data": "Batch", "utils": "LossAndLogs"}.items():      # for its training only, with its environments
        sys.modules[name] = types.SimpleNamespace(**{needed: None})
    sys.path.insert(0, str(checkout / "src"))
    from models.diffusion import Denoiser, DenoiserConfig, DiffusionSampler, DiffusionSamplerConfig, InnerModelConfig
    of = lambda kind, **known: kind(**{field.name: known[field.name] for field in fields(kind) if field.name in known})    # its branches differ
    inner = of(InnerModelConfig, img_channels=3, num_steps_conditioning=4, cond_channels=256, depths=[2] * 4, channels=[64] * 4,
               attn_depths=[0] * 4, num_actions=18)
    denoiser = Denoiser(of(DenoiserConfig, inner_model=inner, sigma_data=0.5, sigma_offset_noise=0.3, noise_previous_obs=False)).eval()
    sampler = DiffusionSampler(denoiser, DiffusionSamplerConfig(num_steps_denoising=3))
    sample = getattr(sampler, "sample_next_obs", None) or sampler.sample
    seen, keys = torch.rand(1, 4, 3, 64, 64) * 2 - 1, torch.zeros(1, 4, dtype=torch.long)

    def frame(key: int) -> np.ndarray:   # uint8 (64, 64, 3)
        nonlocal seen, keys
        keys = torch.cat([keys[:, 1:], torch.tensor([[key]])], 1)
        new = sample(seen, keys)[0]
        seen = torch.cat([seen[:, 1:], new[:, None]], 1)
        return ((new[0].clamp(-1, 1) + 1) * 127.5).byte().movedim(0, -1).numpy()
    return frame, denoiser


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of DIAMOND's repository")
    parser.add_argument("--frames", type=int, default=100, help="measured frames, after 10 for warm-up (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True, help="the results file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    frame, model = diamond(args.checkout)
    frame(0)
    figures = [course.Figure("load_s", time.perf_counter() - begin, "s", 1, source="build the model and show the first frame")]
    rng, times = np.random.default_rng(args.seed), []
    for _ in range(10 + args.frames):
        key, begin = int(rng.integers(18)), time.perf_counter()
        picture = frame(key)
        times.append([1000 * (time.perf_counter() - begin)] * 2)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    figures += speed_figures(np.array(times[10:]), 1, "float32", True, "")
    figures.append(course.Figure("peak_memory_gb", peak_memory_gb(), "GB", 1, source="of the whole process"))
    figures.append(course.Figure("parameters", float(sum(p.numel() for p in model.parameters())), "", 1, source="DIAMOND, random weights"))
    course.print_figures(figures)
    course.save_results(args.json, f"python tools/peers.py diamond --frames {args.frames} --json {args.json}", figures, args.seed)


if __name__ == "__main__": main()
