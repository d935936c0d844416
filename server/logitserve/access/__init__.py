"""Who may call: keys, web origins and hosts, and what proxies say of a client."""
