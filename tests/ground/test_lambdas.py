import pytest

from dera_merge.lambdas import folder_name, parse_lambdas


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["0.5"], [0.5]),
        (["0.25,0.5", "1"], [0.25, 0.5, 1.0]),
        (["0:2:0.25"], [0.25 * n for n in range(9)]),
        (["0:0.3:0.1"], [0.0, 0.1, 0.2, 0.3]),  # 0.1 + 0.2 is 0.3 in decimal arithmetic
        (["1:0:-0.5"], [1.0, 0.5, 0.0]),
        (["0.5", "0.50", "5e-1"], [0.5]),
        (["-0.5"], [-0.5]),
    ],
)
def test_numbers_lists_and_ranges_are_parsed_in_decimal_arithmetic(texts, values):
    assert parse_lambdas(texts) == values


def test_minus_zero_is_zero():
    assert str(parse_lambdas(["-0"])) == "[0.0]"


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1e999", "", "x", "0:1:0", "0:1:0.3", "1:0:0.5", "0:1", "0:1e9:1e-9", "0:100:1e-999999", "1_0", "0.5+0.25"]
)
def test_what_is_no_finite_lambda_is_refused(text):
    with pytest.raises(ValueError, match=r"λ|range|number"):
        parse_lambdas([text])


def test_two_lambdas_with_one_name_are_refused():
    with pytest.raises(ValueError, match="both called 0.333333"):
        parse_lambdas(["0.3333333", "0.3333334"])


def test_folder_names_are_percent_g():
    assert [folder_name(x) for x in (0.5, 1.0, 1e-7)] == ["lambda-0.5", "lambda-1", "lambda-1e-07"]
