"""Write the logs of three small dense models that other code trains, and the text they read.

    make test-parity                                          # installs torch
    PYTHONPATH=.:tests .venv/bin/python tests/parity/foreign_logs.py FOLDER

`adamw/` and `adam/` are output folders of transformers' Trainer (trainer_state.json, and in `adam/`
event files of TensorBoard), the latter with torch.optim.Adam(weight_decay=0.1); `loop.csv` is of a
loop in PyTorch with AdamW. All have the tokenizer `tokenizer/` and the text `text.txt`.
"""

import csv
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bitnet_jax import data
from bitnet_jax.config import DataConfig

LENGTH, BATCH, STEPS, RATE = 32, 16, 300, 1.5e-3


def text(folder: Path) -> data.TokenData:
    """Some of the standard library as one file, its tokenizer in a folder, and its tokens."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))
    (folder / "text.txt").write_text("\n".join(path.read_text() for path in sources))
    tokens = data.load(DataConfig(corpus=f"text:{folder / 'text.txt'}", tokenizer="bpe:1024"))
    tokens.tokenizer.save(folder / "tokenizer")
    return tokens


def windows(tokens_N, count: int) -> list[dict]:
    """Examples as a Trainer takes them; the model shifts the labels itself."""
    rows = np.array(tokens_N[: count * LENGTH], np.int64).reshape(-1, LENGTH)
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, tie_word_embeddings=False, **shape, **heads)
    )


def train(folder: Path, tokens, optimizer=None, steps: int = STEPS) -> None:
    """One run of transformers' Trainer."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=20,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=25,
        save_steps=steps,
        report_to=["tensorboard"],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    net = model()
    given = (optimizer(net.parameters()), None) if optimizer else (None, None)
    if optimizer:
        warm = torch.optim.lr_scheduler.LambdaLR(given[0], lambda n: min(1.0, (n + 1) / 20))
        given = (given[0], warm)
    Trainer(
        net,
        arguments,
        train_dataset=windows(tokens.train_N, BATCH * steps),
        eval_dataset=windows(tokens.validation_N, 4 * BATCH),
        optimizers=given,
    ).train()


def loop(path: Path, tokens, steps: int = STEPS) -> None:
    """A loop of one's own, with a CSV file of its own."""
    net, examples = model(), windows(tokens.train_N, BATCH * steps)
    adamw = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["iter", "train/loss", "train/lr", "grad norm"])
        for step in range(1, steps + 1):
            batch = examples[(step - 1) * BATCH : step * BATCH]
            batch = {key: torch.stack([x[key] for x in batch]) for key in batch[0]}
            loss = net(**batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
            rows.writerow([step, f"{loss.item():.4f}", RATE, f"{norm.item():.4f}"])


def coupled(parameters) -> torch.optim.Adam:
    """Decay that Adam normalises together with the gradient."""
    return torch.optim.Adam(parameters, lr=RATE, weight_decay=0.1)


def main(folder: Path, steps: int = STEPS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = text(folder)
    train(folder / "adamw", tokens, steps=steps)
    train(folder / "adam", tokens, coupled, steps)
    loop(folder / "loop.csv", tokens, steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
