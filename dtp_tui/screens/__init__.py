"""The screens of the dashboard, each beside its stylesheet."""
