"""The one exception a user can cause: a setting or a file that cannot be used as it is."""


class SettingsError(ValueError):
    """Names the setting, the rule it breaks and the value found; shown without a traceback."""
