"""What feplb says about the machine and the job it runs in. Read-only: nothing here changes it."""
