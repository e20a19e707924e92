"""Chat templates: what ends a turn, system turns, templates that think.   pytest tests/test_chat_template.py"""

from rlt.chat_template import ChatTemplate, turn_ends
from rlt.errors import UserError
from rlt.prompts import EXPLANATION, STUDENT_SYSTEM, THOUGHT, Prompts

import pytest
from small_tokenizers import CHATML, GPT_OSS, LLAMA_2, QWEN_3_HYBRID, QWEN_3_THINKING, R1, make_tokenizer

ROW = {"question": "How many?", "solution": "There are \\boxed{42}.", "explanation": "Think."}
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header|>' + m.role + '<|end_header|>\n\n' + m.content.strip() + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}### assistant:\n"
CLOSED_LATE = CHATML.replace("+ '<|im_end|>\\n'", "+ ('' if loop.last and m.role == 'assistant' else '<|im_end|>\\n')")
GLM = (  # a turn ends where the next one starts
    "<s>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = (  # Gemma 2
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content.strip() + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)
LEAVES_OUT_SYSTEM = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
STRIPS_OUR_THOUGHT = CHATML.replace("m.content", "m.content.split('<|end_of_thought|>')[-1]")


# -- what ends a turn


@pytest.mark.parametrize(
    ("template", "special", "generation_eos", "ends"),
    [
        (CHATML, ("<|im_start|>", "<|im_end|>"), (), ("<|im_end|>", "</s>")),
        (CHATML, ("<|im_start|>", "<|im_end|>"), ("</s>", "<|im_end|>"), ("<|im_end|>", "</s>")),
        (CHATML, (), (), ("</s>",)),  # the tags are no tokens: what ends a turn is the eos
        (LLAMA_2, (), (), ("</s>",)),
        (LLAMA_3, ("<|header|>", "<|end_header|>", "<|eot|>", "<|eom|>"), ("<|eom|>",), ("<|eot|>", "</s>", "<|eom|>")),
        (PHI_3, ("<|user|>", "<|assistant|>", "<|end|>"), (), ("<|end|>", "</s>")),
        (PHI_3, ("<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",), ("<|end|>", "</s>")),
        (GPT_OSS, ("<|start|>", "<|return|>", "<|end|>"), (), ("<|return|>", "</s>")),
        (NO_END, (), (), ("</s>",)),
        (CLOSED_LATE, ("<|im_start|>", "<|im_end|>"), (), ("<|im_end|>", "</s>")),
        (GLM, ("<|user|>", "<|assistant|>"), ("</s>", "<|user|>"), ("</s>", "<|user|>")),
        (NO_SYSTEM, ("<|turn|>", "<|end|>"), (), ("<|end|>", "</s>")),
        (None, (), (), ("</s>",)),
    ],
)
def test_turns_end_by_the_templates_own_end_first(template, special, generation_eos, ends):
    tokenizer = make_tokenizer("llama-2", template or CHATML, special)
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.generation_eos = tuple(map(ids, generation_eos))
    assert turn_ends(tokenizer) == tuple(map(ids, ends))


def test_a_token_of_the_vocabulary_that_is_not_special_can_end_a_turn():
    tokenizer = make_tokenizer("gemma", CHATML, special=())
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # as some fine-tuned models have them
    assert turn_ends(tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_without_any_end_there_is_one_line():
    tokenizer = make_tokenizer("gemma", NO_END, special=(), eos=None)
    with pytest.raises(UserError, match="has no token that ends a turn"):
        turn_ends(tokenizer)


def test_the_templates_end_is_trained_and_every_end_finishes():
    """Kind 1: the tokenizer's eos is </s>, turns end in <|im_end|>, and generation_config lists both and a third."""
    tokenizer = make_tokenizer("gemma")
    tokenizer.generation_eos = tuple(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<unk>"]))
    prompts = Prompts(tokenizer)
    im_end, eos, third = turn_ends(tokenizer)
    assert tokenizer.convert_ids_to_tokens([im_end, eos, third]) == ["<|im_end|>", "</s>", "<unk>"]
    for view in ("student", "teacher"):
        ids, start = prompts.sft_row(ROW, view)
        assert ids[-1] == im_end and ids[start:].count(im_end) == 1 and eos not in ids[start:]
    ids, finished = prompts.encode_explanation(ROW)
    assert finished and ids[-1] == im_end
    for end in (im_end, eos, third):
        explanation = prompts.split_completion([*ids[:-1], end], finished=True)
        assert explanation.closed and explanation.text == "Think.\n\n" and explanation.end[-1] == end


# -- system turns


@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATING, LEAVES_OUT_SYSTEM])
def test_without_a_system_turn_its_text_goes_before_the_question(template, capsys):
    tokenizer = make_tokenizer("gemma", template)
    prompts = Prompts(tokenizer)
    assert capsys.readouterr().out.count("has no system turn") == 1
    text = tokenizer.decode(prompts.question_prompt(ROW))
    assert f"{STUDENT_SYSTEM}\n\nHow many?" in text
    messages = prompts.chat_messages(ROW, "Think.\n\n")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    ids, start = prompts.sft_row({**ROW, "messages": messages}, "student")
    assert ids[:start] == prompts.question_prompt(ROW)
    assert ids == prompts.sft_row(ROW, "student")[0]
    prompts.teacher_prompt(ROW), prompts.student_prompt(ROW)
    assert capsys.readouterr().out == ""


def test_a_tokenizer_without_words_for_it_goes_without_a_system_turn(capsys):
    """The toy: system messages are left out by its template, and their words are not in its vocabulary."""
    from data import toy

    tokenizer = toy.make_tokenizer(n_clocks=2, rooms=False)
    assert not ChatTemplate(tokenizer).folds_system and capsys.readouterr().out == ""
    prompt = Prompts(tokenizer).question_prompt({"question": "x 3 y 7 s1 swap"})
    assert tokenizer.decode(prompt) == "<|user|> x 3 y 7 s1 swap <|assistant|>"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('no turns today\nplease') }}", "refuses the turns user .no turns today.$"),
        ("{{ undefined_name.attribute }}", "refuses the turns user"),
        ("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", "leaves out a turn"),
        ("{{ messages[0].content }}", "leaves out a turn"),
        (None, "has no chat template"),
    ],
)
def test_what_no_prompt_can_be_made_with_is_one_line(template, complaint):
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=complaint) as error:
        Prompts(tokenizer)
    assert "\n" not in str(error.value)


def test_messages_that_the_template_refuses_are_one_line():
    prompts = Prompts(make_tokenizer("llama-2", LLAMA_2))
    turn = {"role": "user", "content": "q"}
    with pytest.raises(UserError, match="refuses the turns user, user .Conversation roles must alternate"):
        prompts.sft_row({"messages": [turn, turn, {"role": "assistant", "content": "a"}]}, "student")


# -- templates of models that think


@pytest.mark.parametrize(
    ("template", "start", "said"),
    [
        (CHATML, "<|im_start|>assistant\n", 0),
        (QWEN_3_HYBRID, "<|im_start|>assistant\n<think>\n\n</think>\n\n", 0),
        (QWEN_3_THINKING, "<|im_start|>assistant\n<think>\n\n</think>\n\n", 1),
        (R1, "<|Assistant|>", 1),
        (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", 1),
    ],
)
def test_prompts_start_the_turn_that_the_template_writes_when_it_is_finished(template, start, said, capsys):
    """Neither inside an opened thought of the model's own, nor without the empty thought that a finished turn has."""
    tokenizer = make_tokenizer("byte-level", template, special=("<|im_start|>", "<|im_end|>", "<|return|>"))
    prompts = Prompts(tokenizer)
    assert capsys.readouterr().out.count("starts an answer by") == said
    student, teacher = (tokenizer.decode(ids) for ids in (prompts.student_prompt(ROW), prompts.teacher_prompt(ROW)))
    assert student.endswith(f"{start}{THOUGHT[0]}\n\n")
    assert teacher.endswith(f"{EXPLANATION[0]}\n\n") and f"{start}<|begin_of_solution|>" in teacher
    messages = prompts.chat_messages(ROW, "Think.\n\n")
    ids, _ = prompts.sft_row({**ROW, "messages": messages}, "student")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(tokenizer.decode(ids))  # and at most a newline behind the end of turn


def test_a_template_that_takes_our_thought_out_of_a_finished_turn_is_named(capsys):
    tokenizer = make_tokenizer("byte-level", STRIPS_OUR_THOUGHT)
    prompts = Prompts(tokenizer)
    assert "rewrites the thought of a finished turn" in capsys.readouterr().out
    ids, _ = prompts.sft_row(ROW, "student")  # made without the template: the thought is in it
    assert "Think.\n\n<|end_of_thought|>" in tokenizer.decode(ids)


def test_a_date_in_the_prompt_does_not_change_overnight():
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
    dated = CHATML.replace("{% for", today + "{% for", 1)
    tokenizer = make_tokenizer("byte-level", dated)
    assert "26 Jul 2024 2024-07-26" in tokenizer.decode(Prompts(tokenizer).question_prompt(ROW))
