"""From what a user gives (messages, text, images, videos) to what the engine takes: token ids, pixels and positions."""
