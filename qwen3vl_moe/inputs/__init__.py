"""From what a user gives (messages, text, images) to what the engine takes: token ids, pixels and positions."""
