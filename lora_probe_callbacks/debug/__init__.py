"""The isolated debugger of a variance path."""
