"""The end of a turn is one notion, from sampling to saving, whichever of its tokens it is."""

import json

from rlt import models, rollout
from rlt.chat_template import turn_ends
from rlt.prompts import EXPLANATION, Prompts

import pytest
import torch
from conftest import call, mostly_slow
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from bench import zoo

CPU = torch.device("cpu")
ANSWER, AFTER = "\\boxed{7}", "8"
TEMPLATE_END, TOKENIZER_END, LISTED_END = "<|im_end|>", "</s>", "<|eom|>"
ENDS = [TEMPLATE_END, TOKENIZER_END, LISTED_END]


def words():
    """The chat template ends turns by one token, the tokenizer's eos is another, generation_config lists a third."""
    tokenizer = zoo.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", LISTED_END]})
    return tokenizer


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def chain_model(folder, end, listed=(TOKENIZER_END, LISTED_END)):
    """A model that answers ANSWER and `end` to whatever ends in a newline, and would go on with AFTER for ever.

    Its states are the token that it has read, its head a table of what follows which.
    """
    tokenizer, width = words(), 272
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=width, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False))
    said = [*tokenizer("\n" + ANSWER)["input_ids"], *ids_of(tokenizer, end), *tokenizer(AFTER * 2)["input_ids"]]
    with torch.no_grad():
        layer = model.model.layers[0]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(width))
        model.lm_head.weight[said[1:], said[:-1]] = 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if listed:
        GenerationConfig(eos_token_id=ids_of(tokenizer, *listed)).save_pretrained(folder)
    return folder


def question(tokenizer):
    return tokenizer("<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]


# -- sampling


@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("end", ENDS)
def test_sampling_stops_at_each_of_them(tmp_path, end, temperature):
    chain_model(tmp_path, end)
    tokenizer, model = models.load_tokenizer(str(tmp_path)), models.load_model(str(tmp_path), bits=32, device=CPU)
    assert turn_ends(tokenizer) == tuple(ids_of(tokenizer, *ENDS))
    answers = rollout.generate(model, tokenizer, [question(tokenizer)] * 2, max_new_tokens=30, temperature=temperature,
                               seed=0)
    for answer in answers:
        assert answer.finished and len(answer.ids) == len(answer.logprobs) == len(ANSWER) + 1
        assert tokenizer.decode(answer.ids) == ANSWER + end


def test_other_special_tokens_do_not_stop_it(tmp_path):
    chain_model(tmp_path, "<|im_start|>")
    tokenizer, model = models.load_tokenizer(str(tmp_path)), models.load_model(str(tmp_path), bits=32, device=CPU)
    [answer] = rollout.generate(model, tokenizer, [question(tokenizer)], max_new_tokens=20, temperature=0, seed=0)
    assert not answer.finished and len(answer.ids) == 20


@pytest.mark.parametrize("end", ENDS)
def test_each_of_them_closes_an_explanation(tmp_path, end):
    chain_model(tmp_path, end)
    tokenizer = models.load_tokenizer(str(tmp_path))
    prompts, [closing] = Prompts(tokenizer), ids_of(tokenizer, end)
    ids = [*tokenizer("So 7.\n\n" + EXPLANATION[1])["input_ids"], closing]
    explanation = prompts.split_completion(ids, True)
    assert explanation.closed and explanation.text == "So 7.\n\n" and explanation.end[-1] == closing
    row = prompts.scoring_row({"question": "How many?", "solution": "7"}, explanation)
    assert row.teacher_end[-1] == closing and closing not in row.bridge + row.solution + row.thought


# -- evaluation


@pytest.mark.parametrize("end", mostly_slow(ENDS, plain=[LISTED_END]))
def test_an_evaluation_reads_the_answer_without_its_end(tmp_path, graded_here, end):
    chain_model(tmp_path / "model", end)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "How many?", "answer": "7"}) + "\n")
    call(tmp_path, "evaluate.py", "--task", "gsm8k", "--data", "rows.jsonl", "--model", "model", "--max-new-tokens", 25)
    result = json.loads((tmp_path / "runs/eval/model/eval_gsm8k.json").read_text())
    assert result["exact_match"]["mean"] == 1 and result["truncated"] == 0 and result["length"] == len(ANSWER) + 1
    [line] = map(json.loads, (tmp_path / "runs/eval/model/eval_gsm8k_samples.jsonl").read_text().splitlines())
    assert line["output"] == ANSWER and line["finished"]


def test_a_thought_that_the_prompt_opens_is_part_of_the_turn(tmp_path):
    """One that never closes has no answer yet, whatever it says: in evaluations, in rewards and in a solver's rows."""
    chain_model(tmp_path / "model", TEMPLATE_END)
    template = tmp_path / "model/chat_template.jinja"
    opened = "<|im_start|>assistant\n<think>\n"
    template.write_text("{% for m in messages %}{% if m.role == 'assistant' %}" + opened + "{% else %}<|im_start|>"
                        "{{ m.role }}\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}" + opened + "{% endif %}")
    row = {"question": "How many?", "nums": [7], "target": 7}  # none of the three needs a solution
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    flags = ["--task", "countdown", "--data", "rows.jsonl", "--model", "model", "--max-new-tokens", 25]
    call(tmp_path, "evaluate.py", *flags)
    result = json.loads((tmp_path / "runs/eval/model/eval_countdown.json").read_text())
    line = json.loads((tmp_path / "runs/eval/model/eval_countdown_samples.jsonl").read_text().splitlines()[0])
    assert line["output"] == "<think>" + ANSWER and line["answer"] is None and result["exact_match"]["mean"] == 0
    scope = call(tmp_path, "rl_student.py", *flags, "--steps", 1, "--prompts-per-step", 1, "--group-size", 2,
                 "--eval-every", 0, "--keep-zero-groups")
    assert scope["rewards"].tolist() == [-1, -1] and scope["texts"] == ["<think>" + ANSWER] * 2
    call(tmp_path, "distill.py", *flags, "--solver", "--keep-wrong", "--out", "rows_out.jsonl")
    line = json.loads((tmp_path / "rows_out.jsonl").read_text().splitlines()[0])
    assert not line["right"] and line["messages"][-1]["content"] == ANSWER, "the template writes the tag itself"


def test_a_right_answer_is_the_solution_of_a_row_without_one(tmp_path):
    """Rows of countdown have none; what is kept can be trained on."""
    chain_model(tmp_path / "model", TEMPLATE_END)
    (tmp_path / "rows.jsonl").write_text('{"nums": [7], "target": 7}\n' * 4)
    call(tmp_path, "distill.py", "--solver", "--task", "countdown", "--data", "rows.jsonl", "--model", "model",
         "--max-new-tokens", 25, "--out", "kept.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(line["right"], line["solution"], line["messages"][-1]["content"]) for line in lines] == [
        (True, "7", ANSWER)] * 4
    call(tmp_path, "sft_student.py", "--data", "kept.jsonl", "--model", "model", "--val-rows", 0, "--steps", 1)


# -- training and saving


def test_training_rows_end_by_the_templates_own(tmp_path):
    chain_model(tmp_path, TOKENIZER_END)
    tokenizer = models.load_tokenizer(str(tmp_path))
    row = {"question": "How many?", "solution": "7", "explanation": "Count."}
    for view in ("student", "teacher"):
        ids, start = Prompts(tokenizer).sft_row(row, view)
        assert [i for i in ids[start:] if i in turn_ends(tokenizer)] == ids_of(tokenizer, TEMPLATE_END) == ids[-1:]


@pytest.mark.parametrize("listed", [(), (TEMPLATE_END,), (LISTED_END,)])
def test_a_turn_may_end_by_two_tokens(listed):
    """As Command R7B's: the end of the response, then that of the turn. The first is an end for all that reads it."""
    tokenizer = words()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content + '", "m.content + ('</s>' if m.role == 'assistant' else '') + '")
    tokenizer.eos_token = TEMPLATE_END
    tokenizer.generation_eos = tuple(ids_of(tokenizer, *listed))
    prompts, (first, second) = Prompts(tokenizer), ids_of(tokenizer, "</s>", TEMPLATE_END)
    row = {"question": "How many?", "solution": "7", "explanation": "Count."}
    assert turn_ends(tokenizer)[0] == first and second in turn_ends(tokenizer)
    ids, start = prompts.sft_row(row, "student")
    assert ids[-1] == first and tokenizer.decode(ids[start:-1]).count("</s>") == 0
    sampled, finished = prompts.encode_explanation(row)
    assert finished and sampled[-1] == first and prompts.split_completion(sampled, finished).closed


@pytest.mark.parametrize("rank", mostly_slow([0, 2], plain=[0]))
@pytest.mark.parametrize("end", mostly_slow(ENDS, plain=[LISTED_END]))
def test_a_trained_folder_stops_where_its_base_does(tmp_path, end, rank):
    """By our sampler and by transformers' own generate; full weights and adapters, the latter's tokenizer gone, too."""
    chain_model(tmp_path / "base", end)
    row = {"question": "How many?", "solution": "7", "explanation": "Count."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    call(tmp_path, "sft_student.py", "--model", "base", "--data", "rows.jsonl", "--lora-rank", rank, "--steps", 1,
         "--lr", 1e-6, "--val-rows", 1, "--out", "run")
    final = tmp_path / "run/final"
    if rank:
        for file in final.glob("*token*"):
            file.unlink()
    tokenizer, model = models.load_tokenizer(str(final)), models.load_model(str(final), bits=32, device=CPU)
    assert turn_ends(tokenizer) == tuple(ids_of(tokenizer, *ENDS))
    [answer] = rollout.generate(model, tokenizer, [question(tokenizer)], max_new_tokens=20, temperature=0, seed=0)
    assert answer.finished and tokenizer.decode(answer.ids) == ANSWER + end
    if not rank:
        theirs = AutoModelForCausalLM.from_pretrained(final)
        assert theirs.generation_config.eos_token_id == ids_of(tokenizer, *ENDS)
        out = theirs.generate(torch.tensor([question(tokenizer)]), max_new_tokens=20, do_sample=False)
        assert tokenizer.decode(out[0, len(question(tokenizer)) :]) == ANSWER + end


# -- where the model says it


def test_ends_may_stand_in_the_config_alone(tmp_path):
    """generation_config is missing; config.json has a list, of which only special tokens are believed."""
    chain_model(tmp_path, LISTED_END, listed=())
    tokenizer = words()
    config = json.loads((tmp_path / "config.json").read_text())
    [letter] = tokenizer("a")["input_ids"]
    listed = [*ids_of(tokenizer, TOKENIZER_END, LISTED_END), letter]
    for eos, believed in ((listed, [LISTED_END]), (letter, []), (None, [])):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
        ends = turn_ends(models.load_tokenizer(str(tmp_path)))
        assert ends == tuple(ids_of(tokenizer, TEMPLATE_END, TOKENIZER_END, *believed))


@pytest.mark.parametrize("listed", [[], None, "2", [[2]], [-1], [10**6], True])
def test_what_is_no_id_is_no_end(tmp_path, listed):
    chain_model(tmp_path, LISTED_END, listed=())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert turn_ends(models.load_tokenizer(str(tmp_path))) == tuple(ids_of(words(), TEMPLATE_END, TOKENIZER_END))
