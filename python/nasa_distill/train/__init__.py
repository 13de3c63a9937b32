"""NASA-T. `nasa_t.Run` is a whole run; `config.Settings` is all that it depends on."""
