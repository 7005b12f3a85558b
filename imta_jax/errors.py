"""The error that a user can mend."""


class UsageError(ValueError):
  """Bad input: its message is one line naming the value, what was expected and how to mend it.

  The command line prints the message alone; any other exception is a fault of ours and keeps its
  stack trace.
  """
