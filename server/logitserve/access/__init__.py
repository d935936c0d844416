"""Access to the server: keys, web origins and hosts, and a client's facts from proxies."""
