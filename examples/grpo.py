"""GRPO: trains an adapter on a reward, kept near the base by the divergence from it, with no second base in memory.

    python examples/grpo.py    # about a minute on two CPU cores, and one more for the adapter to begin with

Begins with the adapter of preference.py, which answers in bare names; the reward is a function of the answer's text, 1
for a sentence. Prints and writes to results.json what it answers to held-out questions before and after, and what
became of the base's own text.
"""

from datasets import Dataset
from preference import SETTINGS, begin, in_a_sentence, measure, options, questions, report
from trl import GRPOConfig, GRPOTrainer

from modeling_moextend import use_reference
from modeling_moextend.tools.interrupts import run_script


def main() -> None:
    chosen = options(__doc__, "outputs/preference/grpo", max_steps=20)
    model, tokenizer = begin(chosen.base, chosen.start)
    before = measure(model, tokenizer, chosen.base)
    settings = {"num_generations": 8, "per_device_train_batch_size": 32, "max_completion_length": 16}
    settings |= {"learning_rate": 5e-4, "logging_steps": 4, "beta": 0.0}
    trainer = GRPOTrainer(
        model,
        in_a_sentence,
        args=GRPOConfig(chosen.output_dir, max_steps=chosen.max_steps, **SETTINGS, **settings),
        train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in questions()[0]]),
        processing_class=tokenizer,
    )
    use_reference(trainer, beta=0.02)  # the same model without this adapter
    trainer.train()
    trainer.save_model()
    report(before, measure(model, tokenizer, chosen.base), chosen.output_dir)


if __name__ == "__main__":
    run_script(main)
