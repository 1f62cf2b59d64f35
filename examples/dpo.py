"""DPO: teaches an adapter which of two answers is the better one, with the base as its reference, no second base.

    python examples/dpo.py    # about a minute on two CPU cores, and one more for the adapter to begin with

Begins with the adapter of preference.py, which answers in bare names, and prefers sentences. Prints and writes to
results.json what it answers to held-out questions before and after, and what became of the base's own text.
"""

from datasets import Dataset
from preference import SETTINGS, begin, measure, options, questions, report
from trl import DPOConfig, DPOTrainer

from modeling_moextend.tools.interrupts import run_script


def main() -> None:
    chosen = options(__doc__, "outputs/preference/dpo", max_steps=24)
    model, tokenizer = begin(chosen.base, chosen.start)
    before = measure(model, tokenizer, chosen.base)
    settings = {"beta": 0.3, "learning_rate": 5e-4, "per_device_train_batch_size": 8, "logging_steps": 4}
    trainer = DPOTrainer(
        model,
        model.reference(),  # the same model without this adapter
        args=DPOConfig(chosen.output_dir, max_steps=chosen.max_steps, **SETTINGS, **settings),
        train_dataset=Dataset.from_list(questions()[0]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    report(before, measure(model, tokenizer, chosen.base), chosen.output_dir)


if __name__ == "__main__":
    run_script(main)
