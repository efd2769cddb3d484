import pytest

from distill.commands import run, train_parser
from fast_diffusers.errors import UserError


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("data.height is 9"), 1, "error: data.height is 9\n"),
        (FileNotFoundError("no LoRA file"), 1, "error: no LoRA file\n"),
        (KeyboardInterrupt(), 130, "interrupted; continue with --resume\n"),
    ],
)
def test_mistakes_and_interrupts_end_in_one_line(error, code, message, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err == message


def test_programming_errors_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


def test_settings_are_collected():
    arguments = train_parser("text", "digits").parse_args(["--set", "a=1", "--set", "b=2", "--resume"])
    assert arguments.set == ["a=1", "b=2"] and arguments.resume and arguments.recipe == "digits"
