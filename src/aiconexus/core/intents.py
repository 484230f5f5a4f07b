"""What is asked in words or by task, and what is answered before anything is executed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, JsonValue, field_validator


class Intent(BaseModel):
    """What another agent wants: in words (`query`) or structured (`task` with `params`).

    Attributes:
        id: The message's id.
        sender: DID of the agent that asks; its signature was verified.
        query: Natural language.
        context: Whatever the sender adds to that.
        task: Name of a task, where it asks by name.
        params: What belongs to the task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    sender: str
    query: str | None = None
    context: JsonValue = None
    task: str | None = None
    params: dict[str, JsonValue] | None = None


class Quote(BaseModel):
    """The answer to an Intent.

    Attributes:
        status: For the asking agent to act on, such as "understood" or "not_understood"; not "cancel",
            which asks to cancel.
        required_input: Which input an execution needs.
        cost: What it would cost, for people, such as "0.50 EUR".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: str
    required_input: str | list[str] | None = None
    cost: str | None = None

    @field_validator("status")
    @classmethod
    def _is_no_command(cls, status: str) -> str:
        if status in ("", "cancel"):
            raise ValueError('a status is neither empty nor "cancel"')
        return status
