"""Tasks of general knowledge and language that need no hub: abilities that fine-tuning should not change."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import numpy as np

from alps_repro.evaluation.tasks import configuration

LETTERS = ["A", "B", "C", "D"]


def _choice(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return configuration(
        name,
        rows,
        ("acc",),
        output_type="multiple_choice",
        doc_to_text="prompt",
        doc_to_choice="options",
        doc_to_target="answer",
    )


# Facts of the world

#: Country: capital, official currency; `-` for no question. After GeoNames (countries of more than 5 million people;
#: CC BY 4.0), with later changes. Left out: capitals that name their country or are one of two, currencies with two
#: names, and most of the countries that share a currency's name (euro, franc, peso).
COUNTRIES = """
Afghanistan: Kabul, afghani; Algeria: -, dinar; Angola: Luanda, kwanza; Argentina: Buenos Aires, peso;
Australia: Canberra, dollar; Austria: Vienna, -; Azerbaijan: Baku, manat; Bangladesh: Dhaka, taka; Belarus: Minsk, -;
Belgium: Brussels, -; Bolivia: -, boliviano; Brazil: -, real; Bulgaria: Sofia, -; Cambodia: Phnom Penh, riel;
Canada: Ottawa, dollar; Chad: -, franc; Chile: Santiago, peso; China: Beijing, yuan; Colombia: Bogota, peso;
Cuba: Havana, peso; the Czech Republic: Prague, -; the Democratic Republic of the Congo: Kinshasa, -;
Denmark: Copenhagen, krone; the Dominican Republic: Santo Domingo, -; Ecuador: Quito, -; Egypt: Cairo, pound;
Eritrea: -, nakfa; Ethiopia: Addis Ababa, birr; Finland: Helsinki, -; France: Paris, euro; Germany: Berlin, euro;
Ghana: Accra, cedi; Greece: Athens, -; Guatemala: -, quetzal; Haiti: Port-au-Prince, gourde;
Honduras: Tegucigalpa, lempira; Hungary: Budapest, forint; India: New Delhi, rupee; Indonesia: Jakarta, rupiah;
Iran: Tehran, rial; Iraq: Baghdad, dinar; Israel: -, shekel; Italy: Rome, euro; Japan: Tokyo, yen;
Jordan: Amman, dinar; Kazakhstan: -, tenge; Kenya: Nairobi, shilling; Kyrgyzstan: -, som; Laos: Vientiane, kip;
Lebanon: Beirut, -; Libya: Tripoli, dinar; Madagascar: -, ariary; Malawi: -, kwacha; Malaysia: Kuala Lumpur, ringgit;
Mexico: -, peso; Morocco: Rabat, dirham; Mozambique: Maputo, metical; Myanmar: -, kyat; Nepal: Kathmandu, rupee;
the Netherlands: Amsterdam, -; Nicaragua: Managua, cordoba; Nigeria: Abuja, naira; North Korea: Pyongyang, won;
Norway: Oslo, krone; Pakistan: Islamabad, rupee; Papua New Guinea: -, kina; Paraguay: Asuncion, guarani;
Peru: Lima, sol; the Philippines: Manila, peso; Poland: Warsaw, zloty; Portugal: Lisbon, -; Romania: Bucharest, leu;
Russia: Moscow, ruble; Rwanda: Kigali, franc; Saudi Arabia: Riyadh, -; Senegal: Dakar, -; Serbia: Belgrade, dinar;
Slovakia: Bratislava, -; South Africa: -, rand; South Korea: Seoul, won; Spain: Madrid, -; Sudan: Khartoum, pound;
Sweden: Stockholm, -; Switzerland: -, franc; Syria: Damascus, -; Tanzania: -, shilling; Thailand: Bangkok, baht;
Tunisia: -, dinar; Turkey: Ankara, lira; Turkmenistan: -, manat; Uganda: Kampala, shilling; Ukraine: Kyiv, hryvnia;
the United Arab Emirates: Abu Dhabi, dirham; the United Kingdom: London, pound; the United States: Washington, dollar;
Uzbekistan: Tashkent, som; Venezuela: Caracas, bolivar; Vietnam: Hanoi, dong; Zambia: Lusaka, kwacha
"""

#: Elements by name and symbol.
ELEMENTS = """
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne,
sodium Na, magnesium Mg, aluminum Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K,
calcium Ca, scandium Sc, titanium Ti, vanadium V, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu,
zinc Zn, gallium Ga, germanium Ge, arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, strontium Sr,
yttrium Y, zirconium Zr, niobium Nb, molybdenum Mo, technetium Tc, ruthenium Ru, rhodium Rh, palladium Pd, silver Ag,
cadmium Cd, indium In, tin Sn, antimony Sb, tellurium Te, iodine I, xenon Xe, cesium Cs, barium Ba, lanthanum La,
cerium Ce, neodymium Nd, samarium Sm, europium Eu, gadolinium Gd, terbium Tb, dysprosium Dy, erbium Er, hafnium Hf,
tantalum Ta, tungsten W, rhenium Re, osmium Os, iridium Ir, platinum Pt, gold Au, mercury Hg, lead Pb, bismuth Bi,
radium Ra, thorium Th, uranium U, plutonium Pu
"""

DISTRACTORS = 3


def _facts() -> dict[str, list[tuple[str, str]]]:
    """{kind: (question, right answer)}, 80 of each kind."""
    countries = [re.split(": |, ", entry.strip()) for entry in COUNTRIES.split(";")]
    elements = [entry.split() for entry in ELEMENTS.split(",")]
    return {
        "capital": [(f"What is the capital of {name}?", capital) for name, capital, _ in countries if capital != "-"],
        "currency": [
            (f"What is the official currency of {name}?", currency)
            for name, _, currency in countries
            if currency != "-"
        ],
        "element": [(f"What is the chemical symbol of {name}?", symbol) for name, symbol in elements],
    }


def world_facts_questions() -> list[dict[str, Any]]:
    """240 questions with four options, the three kinds in turn; wrong options are other questions' answers."""
    kinds = _facts()
    rows = []
    for i in range(max(map(len, kinds.values()))):
        for kind, facts in kinds.items():
            question, right = facts[i]
            draw = random.Random(question)  # its own generator: adding a question changes no other
            others = sorted({answer for _, answer in facts} - {right})
            options = draw.sample([right, *draw.sample(others, DISTRACTORS)], DISTRACTORS + 1)
            prompt = f"Question: {question}\nAnswer:"
            rows.append({"kind": kind, "prompt": prompt, "options": options, "answer": options.index(right)})
    return rows


def world_facts() -> dict[str, Any]:
    """lm-eval's configuration of capitals, currencies and chemical symbols, zero-shot."""
    return _choice("world_facts", world_facts_questions())


# MMLU's development questions

_MMLU_QUESTION = re.compile(
    r"\s*(?P<question>.*?)\s*\n\(A\)\s(?P<A>.*?)\s+\(B\)\s(?P<B>.*?)\s+\(C\)\s(?P<C>.*?)\s+\(D\)\s(?P<D>.*?)\s*"
    r"\nA: Let's think step by step\.(?P<reasoning>.*)The answer is \((?P<right>[A-E])\)\.?\s*",
    re.DOTALL,
)


def mmlu_dev_questions() -> list[dict[str, Any]]:
    """281 questions of MMLU's 57 subjects, subjects in turn.

    They come from lm-eval's chain-of-thought examples for MMLU, without the reasoning. That file has 282 of the 285
    (college chemistry, formal logic and human aging lack one); one more has five options and is left out.
    """
    text = files("lm_eval").joinpath("tasks/mmlu/flan_cot_fewshot/_cot_prompts.json").read_text(encoding="utf-8")
    subjects = []
    for subject, examples in sorted(json.loads(text).items()):
        head, *questions = examples.split("\n\nQ: ")
        matches = [_MMLU_QUESTION.fullmatch(question) for question in questions]
        subjects.append([_mmlu_row(subject, head.strip(), m) for m in matches if m and "(E)" not in m["D"]])
    longest = max(map(len, subjects))
    return [rows[i] for i in range(longest) for rows in subjects if i < len(rows)]


def _mmlu_row(subject: str, head: str, match: re.Match[str]) -> dict[str, Any]:
    options = "\n".join(f"{letter}. {match[letter]}" for letter in LETTERS)
    prompt = f"{head}\n\n{match['question']}\n{options}\nAnswer:"
    return {"subject": subject, "prompt": prompt, "options": LETTERS, "answer": LETTERS.index(match["right"])}


def mmlu_dev() -> dict[str, Any]:
    """lm-eval's configuration of MMLU's usual prompt, zero-shot, with options scored as letters."""
    return _choice("mmlu_dev", mmlu_dev_questions())


def by_subject(rows: list[dict[str, Any]], encode: Callable[[str], list[int]]) -> dict[str, float]:
    """Accuracy averaged over subjects, as the paper averages MMLU's."""
    subjects = defaultdict(list)
    for row in rows:
        subjects[row["doc"]["subject"]].append(row["acc"])
    return {"acc_by_subject,none": float(np.mean([np.mean(right) for right in subjects.values()]))}


# Prose

#: Minimal characters of a passage, about 150 of SmolLM2's tokens; number of passages.
PASSAGE, PASSAGES = 600, 40


def prose_passages() -> list[dict[str, str]]:
    """Passages of whole sentences from "In the Year 2889" by Michel and Jules Verne (1889, public domain).

    Project Gutenberg's text, as reasoning-gym ships it, without the text around the story.
    """
    text = files("reasoning_gym").joinpath("data/in_the_year_2889.txt").read_text(encoding="utf-8")
    story = text.partition("\nIN THE YEAR 2889.\n")[2].partition("*** END OF")[0]
    passages, passage = [], ""
    for sentence in re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+", " ".join(story.replace("_", "").split())):
        passage = f"{passage} {sentence}".strip()
        if len(passage) >= PASSAGE:
            passages.append({"text": passage})
            passage = ""
    return passages[:PASSAGES]


def prose() -> dict[str, Any]:
    """lm-eval's configuration of the log-likelihood of English prose; `nats_per_token` turns it into a loss."""
    return configuration(
        "prose",
        prose_passages(),
        (),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )


def nats_per_token(rows: list[dict[str, Any]], encode: Callable[[str], list[int]]) -> dict[str, float]:
    """Loss over all passages in nats per token of the model's own tokenizer; each row gets its share of it.

    Each passage is scored as a whole, its first token after the tokenizer's beginning-of-text (or else end-of-text)
    token. The standard error is that of a ratio, over passages.
    """
    for row in rows:
        row["loglikelihood"], row["tokens"] = row["filtered_resps"][0], len(encode(row["doc"]["text"]))
    losses, tokens = (np.array([row[name] for row in rows]) for name in ("loglikelihood", "tokens"))
    loss = -losses.sum() / tokens.sum()
    metrics = {"nats_per_token,none": float(loss)}
    if len(rows) > 1:
        spread = (losses + loss * tokens).std(ddof=1) * np.sqrt(len(rows))
        metrics["nats_per_token_stderr,none"] = float(spread / tokens.sum())
    return metrics
