"""What torch and PEFT are doing, as plain facts. Observes, never judges."""
