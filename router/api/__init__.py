"""The face: routes, authentication, errors to the OpenAI envelope, answers to the client."""
