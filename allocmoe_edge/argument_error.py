"""`ArgumentError`: what `Llama` refuses before llama.cpp sees the model, in the names of Python or of the commands."""


class ArgumentError(ValueError):
    """An argument of `Llama` that cannot be honoured: its name, and why."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"

    def of_command(self) -> str:
        """The same with the option of a command that the argument comes from."""
        return f"--{self.name.replace('_', '-')}: {self.why}"
