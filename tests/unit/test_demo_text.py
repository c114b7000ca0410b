"""The demo text: the same every time, prose, and nothing of the evaluation seen in calibration."""

import re

from lowbit_tools.demo_text import demo_text


def test_same_every_time():
    assert demo_text() == demo_text()


def test_evaluation_is_a_quarter_and_disjoint():
    calibration, evaluation = demo_text()
    assert len(calibration) + len(evaluation) > 100_000
    assert 0.2 < len(evaluation) / (len(calibration) + len(evaluation)) < 0.3
    calibration_paragraphs, evaluation_paragraphs = (text.strip().split("\n\n") for text in (calibration, evaluation))
    assert len(set(calibration_paragraphs)) == len(calibration_paragraphs)
    assert len(set(evaluation_paragraphs)) == len(evaluation_paragraphs)
    assert not set(calibration_paragraphs) & set(evaluation_paragraphs)


def test_only_prose():
    for text in demo_text():
        for paragraph in text.strip().split("\n\n"):
            assert "\n" not in paragraph
            assert len(paragraph.split()) >= 10
            assert not re.search(r"::=|\*{4}|={4}|-{4}|>>>", paragraph)
