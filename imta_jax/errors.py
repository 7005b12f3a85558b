"""The exception for errors that a user can fix."""


class UsageError(ValueError):
  """Invalid input; the message is one line with the value, what was expected and how to fix it.

  The command line prints only the message; any other exception is a bug and keeps its stack trace.
  """


def first_line(error: Exception) -> str:
  """Returns the first line of an error message, or the type of an error without a message."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
