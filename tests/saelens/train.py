"""Run by an interpreter that has SAELens: its BatchTopK trainer on given rows, one thread.

    python train.py ROWS FOLDER --width 512 --k 12 --batch 512 --passes 8 --rate 1e-3 --seed 0

ROWS : safetensors with x [rows, d]. FOLDER gets the SAE in its inference form (JumpReLU). As in alignlens' training the
learning rate rises over the first 2 % and falls over the last 30 % of the steps, and each pass draws a new order and
leaves out the rest that fills no batch. SAELens' defaults hold for all else. --normalize : one of its ways to scale the
input. --window : steps after which a silent latent counts as dead.
Prints one JSON line: samples, steps, seconds and processor_seconds of training (no imports, no reading, no saving).
"""

import argparse
import itertools
import json
import time

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file


def batches(x, size, seed):
    """Batches [size, d] for ever."""
    for epoch in itertools.count():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        for i in range(len(x) // size):
            yield x[order[i * size : (i + 1) * size]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rows")
    parser.add_argument("folder")
    for name, kind in {"width": int, "k": float, "batch": int, "passes": float, "rate": float, "seed": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--normalize", default="none")
    parser.add_argument("--window", type=int)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)

    x = load_file(asked.rows)["x"].float()
    steps = round(asked.passes * (len(x) // asked.batch))
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=asked.width, k=asked.k, normalize_activations=asked.normalize)
    )
    config = SAETrainerConfig(
        total_training_samples=steps * asked.batch,
        train_batch_size_samples=asked.batch,
        lr=asked.rate,
        lr_end=asked.rate / 10,
        lr_warm_up_steps=round(0.02 * steps),
        lr_decay_steps=round(0.3 * steps),
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
        **({"dead_feature_window": asked.window} if asked.window else {}),
    )
    trainer = SAETrainer(config, sae, batches(x, asked.batch, asked.seed))
    start = time.perf_counter(), time.process_time()
    trained = trainer.fit()
    took = {"seconds": time.perf_counter() - start[0], "processor_seconds": time.process_time() - start[1]}
    trained.save_inference_model(asked.folder)
    print(json.dumps({"samples": steps * asked.batch, "steps": steps, **took}))


main()
