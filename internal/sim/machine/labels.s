// Without a file of this kind the compiler wants a body for each function.
