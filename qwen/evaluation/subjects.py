"""Subjects, groups and folder layouts of MMLU, C-Eval and CMMLU, and averages over subjects and groups.

The data of such a benchmark are a folder with one file per subject and split.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .data_files import read_csv, require_files
from .task import JSONObject, Score, group_records, mean

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class SubjectSet:
    """A benchmark of many subjects, each with questions of four options.

    Args:
        title: display name.
        groups: the subjects of each group. Every subject belongs to at least one group, and may belong to several.
        files: path of the file of a subject, with {split} and {subject}.
        columns: the names of question, options and answer in those files.
        header: whether the files start with a line of column names.
        over_subjects: average over subjects, regardless of their sizes, instead of over questions.
        unanswered: splits whose answers are not published.
    """

    title: str
    groups: dict[str, tuple[str, ...]]
    files: str
    columns: tuple[str, ...]
    header: bool
    over_subjects: bool
    unanswered: tuple[str, ...] = ()

    @property
    def subjects(self) -> list[str]:
        """All subjects, in alphabetical order."""
        return sorted({subject for group in self.groups.values() for subject in group})


# Groups as in categories.py of hendrycks/test; lm-evaluation-harness follows the paper, where anatomy is STEM.
MMLU = SubjectSet(
    title="MMLU",
    groups={
        "STEM": (
            "abstract_algebra",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ),
        "humanities": (
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ),
        "social sciences": (
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ),
        "other": (
            "anatomy",
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ),
    },
    files="{split}/{subject}_{split}.csv",
    columns=("question", *LETTERS, "answer"),
    header=False,
    over_subjects=False,
)

# Groups as in subject_mapping.json of hkust-nlp/ceval.
CEVAL = SubjectSet(
    title="C-Eval",
    groups={
        "STEM": (
            "advanced_mathematics",
            "college_chemistry",
            "college_physics",
            "college_programming",
            "computer_architecture",
            "computer_network",
            "discrete_mathematics",
            "electrical_engineer",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_mathematics",
            "high_school_physics",
            "metrology_engineer",
            "middle_school_biology",
            "middle_school_chemistry",
            "middle_school_mathematics",
            "middle_school_physics",
            "operating_system",
            "probability_and_statistics",
            "veterinary_medicine",
        ),
        "social sciences": (
            "business_administration",
            "college_economics",
            "education_science",
            "high_school_geography",
            "high_school_politics",
            "mao_zedong_thought",
            "marxism",
            "middle_school_geography",
            "middle_school_politics",
            "teacher_qualification",
        ),
        "humanities": (
            "art_studies",
            "chinese_language_and_literature",
            "high_school_chinese",
            "high_school_history",
            "ideological_and_moral_cultivation",
            "law",
            "legal_professional",
            "logic",
            "middle_school_history",
            "modern_chinese_history",
            "professional_tour_guide",
        ),
        "other": (
            "accountant",
            "basic_medicine",
            "civil_servant",
            "clinical_medicine",
            "environmental_impact_assessment_engineer",
            "fire_engineer",
            "physician",
            "plant_protection",
            "sports_science",
            "tax_accountant",
            "urban_and_rural_planner",
        ),
        "hard": (
            "advanced_mathematics",
            "college_chemistry",
            "college_physics",
            "discrete_mathematics",
            "high_school_chemistry",
            "high_school_mathematics",
            "high_school_physics",
            "probability_and_statistics",
        ),
    },
    files="{split}/{subject}_{split}.csv",
    columns=("question", *LETTERS, "answer"),
    header=True,
    over_subjects=True,
    unanswered=("test",),
)

# Groups as in categories.py of haonan-li/CMMLU.
CMMLU = SubjectSet(
    title="CMMLU",
    groups={
        "STEM": (
            "anatomy",
            "astronomy",
            "college_actuarial_science",
            "college_engineering_hydrology",
            "college_mathematics",
            "college_medical_statistics",
            "computer_science",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "genetics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_mathematics",
            "high_school_physics",
            "machine_learning",
            "virology",
        ),
        "humanities": (
            "arts",
            "chinese_history",
            "chinese_literature",
            "college_law",
            "global_facts",
            "international_law",
            "jurisprudence",
            "logical",
            "marxist_theory",
            "philosophy",
            "professional_law",
            "world_history",
            "world_religions",
        ),
        "social sciences": (
            "ancient_chinese",
            "business_ethics",
            "chinese_civil_service_exam",
            "chinese_food_culture",
            "chinese_foreign_policy",
            "chinese_teacher_qualification",
            "college_education",
            "economics",
            "education",
            "elementary_chinese",
            "ethnology",
            "high_school_geography",
            "high_school_politics",
            "journalism",
            "management",
            "marketing",
            "modern_chinese",
            "professional_accounting",
            "professional_psychology",
            "public_relations",
            "security_study",
            "sociology",
        ),
        "other": (
            "agronomy",
            "chinese_driving_rule",
            "clinical_knowledge",
            "college_medicine",
            "computer_security",
            "construction_project_management",
            "elementary_commonsense",
            "elementary_information_and_technology",
            "food_science",
            "human_sexuality",
            "legal_and_moral_basis",
            "nutrition",
            "professional_medicine",
            "sports_science",
            "traditional_chinese_medicine",
        ),
        "China specific": (
            "ancient_chinese",
            "chinese_civil_service_exam",
            "chinese_driving_rule",
            "chinese_food_culture",
            "chinese_foreign_policy",
            "chinese_history",
            "chinese_literature",
            "chinese_teacher_qualification",
            "construction_project_management",
            "elementary_chinese",
            "elementary_commonsense",
            "ethnology",
            "high_school_politics",
            "modern_chinese",
            "traditional_chinese_medicine",
        ),
    },
    files="{split}/{subject}.csv",
    columns=("Question", *LETTERS, "Answer"),
    header=True,
    over_subjects=True,
)


def read_subjects(
    folder: Path, split: str, benchmark: SubjectSet, subjects: Sequence[str] | None = None
) -> dict[str, list[dict[str, str]]]:
    """Read the questions of a split by subject: dicts with "question", "A" to "D" and "answer", a letter.

    Splits without published answers have no "answer". A column "id" is kept.

    Args:
        subjects: only these; None for all subjects of the benchmark.

    Raises:
        DataError: the file of a subject is missing or invalid.
    """
    wanted = benchmark.subjects if subjects is None else list(subjects)
    columns = benchmark.columns[:-1] if split in benchmark.unanswered else benchmark.columns
    one_of = {benchmark.columns[-1]: LETTERS} if columns is benchmark.columns else {}
    paths = require_files(folder, [benchmark.files.format(split=split, subject=subject) for subject in wanted])
    return {
        subject: [
            {key.lower() if key not in LETTERS else key: row[key] for key in (*columns, "id") if key in row}
            for row in read_csv(path, columns, header=benchmark.header, one_of=one_of)
        ]
        for subject, path in zip(wanted, paths, strict=True)
    }


def format_options(question: dict[str, str]) -> str:
    """Return the four options, "A. …", one per line, without a line break at the end."""
    return "\n".join(f"{letter}. {question[letter]}" for letter in LETTERS)


def average_scores(records: Sequence[JSONObject], benchmark: SubjectSet) -> list[Score]:
    """Return the accuracy over all questions, of each group that was asked about, and of each subject.

    Args:
        records: dicts with "group", a subject, and "correct".
    """
    subjects = group_records(records)

    def average(name: str, members: Sequence[str]) -> Score:
        selected = [record for subject in members for record in subjects[subject]]
        if benchmark.over_subjects:
            value = mean([{"correct": mean(subjects[subject])} for subject in members])
        else:
            value = mean(selected)
        return Score(name, value, len(selected))

    scores = [average(benchmark.title, list(subjects))]
    for group, members in benchmark.groups.items():
        if present := [subject for subject in members if subject in subjects]:
            scores.append(average(group, present))
    return scores + [average(subject, [subject]) for subject in subjects]


def add_subjects_argument(parser: argparse.ArgumentParser, benchmark: SubjectSet) -> None:
    """Add `--subjects a,b`, a list of subjects that is None by default."""

    def subject_list(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        for name in names:
            if name not in benchmark.subjects:
                near = difflib.get_close_matches(name, benchmark.subjects, n=1)
                hint = f"did you mean {near[0]}?" if near else f"for example {', '.join(benchmark.subjects[:3])}."
                raise argparse.ArgumentTypeError(f"{benchmark.title} has no subject {name!r}; {hint}")
        if not names:
            raise argparse.ArgumentTypeError("name at least one subject")
        return names

    parser.add_argument(
        "--subjects",
        type=subject_list,
        metavar="A,B",
        help=f"only these of the {len(benchmark.subjects)} subjects (the score is then not {benchmark.title}'s)",
    )
