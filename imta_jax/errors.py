"""The exception for errors that a user can fix."""


class UsageError(ValueError):
  """Invalid input; the message is one line with the value, what was expected and how to fix it.

  The command line prints only the message; any other exception is a bug and keeps its stack trace.
  """
