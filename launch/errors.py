"""What can end a job in good order: something the user can mend, found on one rank or on all."""


class SettingsError(ValueError):
    """Names the setting, the rule it breaks and the value found; shown without a traceback."""


class LaunchError(Exception):
    """What went wrong, raised on every rank at once; the cause is set on the ranks where it went wrong."""
