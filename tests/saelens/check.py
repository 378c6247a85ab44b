"""Run by an interpreter that has SAELens: what it makes of a folder.

    python check.py FOLDER ROWS OUT [--fold] [--again FOLDER]

ROWS : safetensors with x [rows, d]. OUT : safetensors with SAELens' codes [rows, w] and rebuilt [rows, d], float32.
--fold : give decoder rows norm 1 when loading. --again : a folder in which SAELens saves what it loaded.
Prints the class and the metadata as JSON.
"""

import argparse
import json

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
parser = argparse.ArgumentParser()
for name in ("folder", "rows", "out"):
    parser.add_argument(name)
parser.add_argument("--fold", action="store_true")
parser.add_argument("--again")
asked = parser.parse_args()

sae = SAE.load_from_disk(asked.folder, fold_W_dec_norm=asked.fold)
if asked.again:
    sae.save_model(asked.again)
with torch.no_grad():
    codes = sae.encode(load_file(asked.rows)["x"].float())
    save_file({"codes": codes.contiguous(), "rebuilt": sae.decode(codes).contiguous()}, asked.out)
print(json.dumps({"class": type(sae).__name__, **sae.cfg.metadata.to_dict()}))
