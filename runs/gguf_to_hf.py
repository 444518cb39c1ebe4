"""Convert a GGUF file of a language model to a Hugging Face directory with float32 weights.

    pip install transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
    python runs/gguf_to_hf.py SmolLM2-135M-Instruct.Q4_1.gguf out/real/smollm2

A 4-bit file stays a 4-bit model: its rounded weights are only stored with more digits.
"""

import sys
from pathlib import Path

import torch
import transformers

file, out = Path(sys.argv[1]), sys.argv[2]
where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
# a model that was read from GGUF counts as quantized and refuses to be saved: move its weights to a plain one
table = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
model = transformers.AutoModelForCausalLM.from_config(type(read.config)(**table))
model.load_state_dict(read.state_dict())
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(out)
