import pytest

from bench.record.tables import format_table, markdown_table


def test_table_aligns_numbers_to_the_right():
    table = format_table(["name", "time", "bytes"], [["gate", 0.43064, 3309568], ["combine", 13.5, None]])
    assert table.splitlines() == [
        "name       time      bytes",
        "-------  ------  ---------",
        "gate      0.431  3,309,568",
        "combine  13.500          -",
    ]


def test_table_without_rows_is_its_header():
    assert format_table(["a", "bb"], []) == "a  bb\n-  --"


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match=r"each row must have 2 cells, one for each of \['a', 'b'\]; got \[1\]"):
        format_table(["a", "b"], [[1]])


def test_markdown():
    assert markdown_table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
