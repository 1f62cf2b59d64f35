"""Learning rates and decay of their own for router rows and deltas: which parameters get them, and that they hold."""

import pytest
import torch
from test_sft_trainer import (
    GATED,
    config,
    gated_trainer,
    image_data,
    make_model,
    make_processor,
    make_trainer,
    tensors,
)

from modeling_moextend.training.groups import kind_of
from modeling_moextend.training.retention import closed_gate
from modeling_moextend.training.trainer import MoExtendSFTTrainer

DELTAS = {"embedding": 2, "attention": 2, "output": 0}
OWN = {"router_learning_rate": 5e-3, "delta_learning_rate": 0.0, "delta_weight_decay": 0.25}
EMBEDDING = {"embedding_learning_rate": 0.5}


def test_every_tensor_has_a_kind():
    model = make_model(scope="all", deltas=DELTAS, selection="compete", calibration="routed", encoder=True)
    kinds = {name: kind_of(name) for name in model.adapter_tensors()}
    assert kinds["layers.1.experts.down_proj"] == kinds["projector.linear_1.weight"] == "experts"
    assert kinds["layers.1.router.weight"] == "router" and kinds["layers.1.calibration.fc1.weight"] == "experts"
    assert kinds["layers.2.embedding.lora_A"] == "embedding"
    assert kinds["output.weight"] == kinds["layers.3.attention.o_proj.lora_B"] == "deltas"


def test_a_rate_that_is_not_given_goes_by_the_stage_and_the_bases_width(tmp_path):
    trainer = make_trainer(tmp_path, make_model(scope="all"), learning_rate=None)
    hidden_size = trainer.model.config.get_text_config().hidden_size
    assert trainer.args.learning_rate == pytest.approx(0.6 / hidden_size) and hidden_size != 192
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {trainer.args.learning_rate}
    args = config(tmp_path, stage="align", learning_rate=None)
    data, processor = image_data(), make_processor()
    model = make_model(encoder=True)
    trainer = MoExtendSFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    assert trainer.args.learning_rate == 1e-3 and args.learning_rate is None, "another trainer may have another base"
    with pytest.raises(ValueError, match="DeepSpeed's configuration is completed before .*: give learning_rate"):
        config(tmp_path, learning_rate=None, deepspeed={"optimizer": {"type": "AdamW"}})


def test_groups_hold_what_was_asked_for_and_all_that_trains(tmp_path):
    trainer = make_trainer(tmp_path, make_model(scope="all", deltas=DELTAS), weight_decay=0.1, **OWN, **EMBEDDING)
    plain = make_trainer(tmp_path, make_model(scope="all", deltas=DELTAS), weight_decay=0.1)
    names = {tensor: name for name, tensor in trainer.trainable.items()}
    found = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            found[names.pop(parameter)] = group["lr"], group["weight_decay"]
    assert not names
    assert found["output.weight"] == (0.0, 0.25) and found["layers.2.embedding.lora_B"] == (0.5, 0.25)
    assert found["layers.1.router.weight"] == (5e-3, 0.1) and found["layers.1.experts.down_proj"] == (1e-2, 0.1)
    assert {group["lr"] for group in plain.create_optimizer().param_groups} == {1e-2, 5e-2}, "the embedding's"
    plain = make_trainer(tmp_path, make_model(scope="all"), weight_decay=0.1)
    assert len(plain.create_optimizer().param_groups) == 2, "as in Trainer, where there is no such delta"


def test_they_hold_in_training_and_after_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, **OWN, "delta_weight_decay": 0.0}
    model = make_model(scope="all", deltas=DELTAS, selection="exclusive", calibration="none")
    before = tensors(model)
    make_trainer(tmp_path, model, **settings).train()
    after = tensors(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {kind_of(name) for name in moved} == {"experts", "router"}
    again = make_model(scope="all", deltas=DELTAS, selection="exclusive", calibration="none")
    trainer = make_trainer(tmp_path, again, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(again).items())


def test_an_optimizer_of_ones_own_keeps_its_groups(tmp_path):
    model = make_model(scope="all", deltas=DELTAS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="was given an optimizer, whose groups are its own, and router_learning_rate"):
        make_trainer(tmp_path, model, optimizers=(optimizer, None), router_learning_rate=1e-3)


def test_the_embeddings_rate_goes_by_the_size_of_what_it_is_added_to(tmp_path):
    model = make_model(**GATED | {"deltas": DELTAS})
    trainer = gated_trainer(tmp_path, model, max_steps=1, lr_scheduler_type="constant")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    sizes = []
    hook = model.get_decoder().layers[2].register_forward_pre_hook(lambda layer, args: sizes.append(args[0]))
    with torch.no_grad(), closed_gate(model):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    size = sizes[0][batch["attention_mask"].bool()].square().mean().sqrt().item()
    trainer.train()
    rates = {
        kind_of(name): group["lr"]
        for name, tensor in trainer.trainable.items()
        for group in trainer.optimizer.param_groups
        if any(tensor is parameter for parameter in group["params"])
    }
    assert rates["experts"] == rates["deltas"] == 1e-2
    assert rates["embedding"] == pytest.approx(5 * size * 1e-2, rel=0.1), "of other samples of the same kind"


@pytest.mark.parametrize("value", [-1.0, float("nan"), "fast"])
def test_a_rate_is_a_number_of_at_least_zero(value, tmp_path):
    with pytest.raises(ValueError, match="delta_learning_rate must be a finite number of at least 0.0"):
        make_trainer(tmp_path, delta_learning_rate=value)


def test_a_gate_is_no_part_of_any_group(tmp_path):
    trainer = gated_trainer(tmp_path, make_model(**GATED | {"deltas": DELTAS}), gate_steps=0, **OWN)
    gate = {id(tensor) for tensor in trainer.model.gate.parameters()}
    assert not any(id(p) in gate for group in trainer.create_optimizer().param_groups for p in group["params"])
