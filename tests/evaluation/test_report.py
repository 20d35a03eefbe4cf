import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from halfbyte.evaluation.card import card
from halfbyte.evaluation.report import html, model_name, weakest
from halfbyte.recipe import Recipe
from sample_report import PROVENANCE, RECIPE, sample_report

VOID = {"meta", "br", "img", "input", "link", "hr"}
CONFIG = {"architectures": ["LlamaForCausalLM"]}


class Page(HTMLParser):
    """The words of a page; ValueError where its tags do not pair."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        if self.open:
            raise ValueError(f"never closed: {self.open}")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.words.append(data.strip())


def check_page(text, report):
    page = Page(text)
    missing = {module.path for module in report.modules} - set(page.words)
    assert not missing


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_page_is_whole_and_names_every_module():
    report = sample_report()
    check_page(html(report), report)


def unclosed_table(text):
    return text.replace("</table>", "", 1)


def crossed_tags(text):
    return text.replace("</tr></thead>", "</thead></tr>", 1)


def lost_module(text):
    return text.replace("model.layers.1.mlp.experts.2.up_proj", "")


@pytest.mark.parametrize("bug", [unclosed_table, crossed_tags, lost_module])
def test_the_check_of_the_page_notices(bug):
    report = sample_report()
    with pytest.raises((ValueError, AssertionError)):
        check_page(bug(html(report)), report)


def test_the_page_needs_nothing_from_elsewhere():
    page = Page(html(sample_report()))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]


def test_the_page_has_a_panel_for_each_kind_and_shows_the_weakest_module():
    page = Page(html(sample_report()))
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["self_attn.q_proj: output SNR by block", "mlp.experts.*.up_proj: output SNR by block"]
    assert "20.0 dB" in page.words


def test_what_a_recipe_says_is_text_and_no_markup():
    report = sample_report(recipe=RECIPE.model_dump(mode="json") | {"summary": "<b>bold</b> & co"})
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; co" in html(report)


def test_a_run_without_data_shows_weight_snr():
    modules = tuple(replace(module, output_snr=None, tokens=0) for module in sample_report().modules)
    report = sample_report(modules=modules, provenance=PROVENANCE | {"calibration": None})
    check_page(html(report), report)
    assert "weight SNR by block" in html(report)
    assert "output SNR by block" not in html(report)
    assert "the recipe needs no data" in card(report, CONFIG)


def test_a_run_that_lost_nothing_has_a_page_and_strict_json():
    modules = tuple(replace(module, weight_snr=math.inf, output_snr=math.inf) for module in sample_report().modules)
    report = sample_report(modules=modules)
    check_page(html(report), report)
    fields = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert fields["modules"][0]["weight_snr"] is None


def test_report_json_keeps_what_was_measured():
    fields = json.loads(json.dumps(sample_report().to_json()))
    assert fields["modules"][3]["path"] == "model.layers.0.mlp.experts.2.up_proj"
    assert fields["modules"][3]["output_snr"] == 23.0
    assert fields["bits_per_weight"] == 4.156


def test_the_weakest_come_first_and_the_unmeasured_before_them():
    first, second, *rest = sample_report().modules
    report = sample_report(modules=(*rest, first, replace(second, output_snr=None)))
    assert weakest(report)[:2] == [replace(second, output_snr=None), first]


def test_the_cards_front_matter_is_what_the_hub_reads():
    fields = front_matter(card(sample_report(), CONFIG))
    assert fields["base_model"] == "some/model"
    assert fields["base_model_relation"] == "quantized"
    assert fields["library_name"] == "transformers"
    assert fields["quantized_bits"] == 4
    assert {"halfbyte", "quantized", "compressed-tensors", "4-bit", "gptq-w4a16"} <= set(fields["tags"])


def test_the_card_lists_every_bit_width_of_a_mixed_recipe():
    recipe = Recipe.load(RECIPE.model_dump() | {"overrides": {"*.q_proj": {"bits": 8}}})
    fields = front_matter(card(sample_report(recipe=recipe.model_dump(mode="json")), CONFIG))
    assert fields["quantized_bits"] == [4, 8]


def test_the_cards_recipe_makes_the_same_recipe_again():
    text = card(sample_report(), CONFIG)
    shown = text.split("```yaml\n")[1].split("```")[0]
    assert Recipe.load(yaml.safe_load(shown)) == RECIPE


def test_the_card_says_where_everything_came_from():
    text = card(sample_report(), CONFIG)
    for told in (
        "1" * 64,
        "2" * 64,
        "3" * 64,
        "128 samples, 262144 tokens: text.txt",
        "| torch | 2.13.0 |",
        "| seed | 7 |",
    ):
        assert told in text


def test_the_card_holds_no_time_and_no_path(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    report = sample_report(model=str(folder))
    slower = replace(
        report, seconds=9.9, peak_host=1, modules=tuple(replace(module, seconds=77.0) for module in report.modules)
    )
    assert card(report, CONFIG) == card(slower, CONFIG)
    assert str(tmp_path) not in card(report, CONFIG)
    assert "base_model" not in front_matter(card(report, CONFIG))
    assert "# my-model" in card(report, CONFIG)


def test_the_card_inherits_the_licence_and_nothing_that_no_longer_holds():
    original = "---\nlicense: other\nlicense_name: mine\nlanguage: no\ndatasets: [x]\nbase_model: y/z\n---\nold words"
    text = card(sample_report(), CONFIG, original)
    fields = front_matter(text)
    assert (fields["license"], fields["license_name"], fields["language"]) == ("other", "mine", "no")
    assert "datasets" not in fields
    assert fields["base_model"] == "some/model"
    assert "old words" not in text


@pytest.mark.parametrize("original", ["no front matter", "---\n{: broken\n---\n", "---\n- a list\n---\n", ""])
def test_a_broken_card_of_the_original_ends_no_run(original):
    assert "license" not in front_matter(card(sample_report(), CONFIG, original))


def test_the_card_loads_the_model_by_its_kind():
    masked = card(sample_report(), {"architectures": ["BertForMaskedLM"]})
    assert "AutoModelForMaskedLM" in masked
    assert "vllm" not in masked
    remote = card(sample_report(), CONFIG | {"auto_map": {}})
    assert remote.count("trust_remote_code=True") == 2
    own = card(sample_report(layout="halfbyte"), CONFIG)
    assert "AutoModel" not in own
    assert front_matter(own)["library_name"] == "halfbyte"


EXPERTS = tuple(f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(3))
ASYMMETRIC = {"weights": {"bits": 4, "convention": "asymmetric", "granularity": {"kind": "group", "size": 128}}}


@pytest.mark.parametrize(
    ("changes", "unquantized", "readers"),
    [
        ({}, (), {"transformers", "vllm"}),
        ({"overrides": {"*self_attn*": {"bits": 8}}}, (), {"transformers", "vllm"}),
        ({}, ("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert.up_proj"), {"transformers", "vllm"}),
        ({"scheme": ASYMMETRIC}, (), {"vllm"}),
        ({"overrides": {"*layers.1.*": {"bits": 8}}}, (), {"vllm"}),
        ({}, EXPERTS, {"vllm"}),
        ({"overrides": {"*experts.1.*": {"bits": 8}}}, (), set()),
        ({}, EXPERTS[1:2], set()),
    ],
    ids=[
        "alike", "attention-differs", "router-left-out", "zero-points", "one-block-differs", "one-block-left-out",
        "one-expert-differs", "one-expert-left-out",
    ],
)  # fmt: skip
def test_the_card_names_no_program_that_would_misread_the_experts(changes, unquantized, readers):
    recipe = Recipe.load(RECIPE.model_dump(mode="json") | changes).model_dump(mode="json")
    modules = tuple(module for module in sample_report().modules if module.path not in unquantized)
    text = card(sample_report(recipe=recipe, unquantized=unquantized, modules=modules), CONFIG)
    assert {
        name for name, words in {"transformers": "AutoModelFor", "vllm": "vllm serve"}.items() if words in text
    } == (readers)
    assert ("transformers fuses" in text) == ("transformers" not in readers)
    assert "halfbyte.load" in text
    assert front_matter(text)["library_name"] == ("transformers" if "transformers" in readers else "halfbyte")


def test_the_python_in_a_card_is_python():
    for config in (CONFIG, {"architectures": ["BertForMaskedLM"], "auto_map": {}}):
        for code in re.findall(r"```python\n(.*?)```", card(sample_report(), config), re.DOTALL):
            compile(code, "card", "exec")


def test_a_model_is_called_by_its_hub_name_or_its_folders(tmp_path):
    assert model_name("org/Model-7B") == "org/Model-7B"
    assert model_name(str(tmp_path / "hub" / "models--org--Model-7B" / "snapshots" / "abc")) == "org/Model-7B"
    assert model_name(str(tmp_path)) == tmp_path.name
