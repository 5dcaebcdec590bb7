"""The methods, one room each: ``methods/<family>/<method>/``. :mod:`headgate.catalog` finds them by their cards."""
