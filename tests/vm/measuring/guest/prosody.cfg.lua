-- The chat server of the measuring machine: no other servers, no modules beyond what a client of today asks for.
pidfile = "/run/prosody/prosody.pid"
daemonize = false
modules_enabled = { "roster", "saslauth", "tls", "disco", "carbons", "pep", "smacks", "ping", "vcard4", "vcard_legacy", "private", "blocklist", "bookmarks", "mam", "csi_simple" }
modules_disabled = { "s2s", "offline" }
authentication = "internal_plain"
storage = "memory"
interfaces = { "127.0.0.1" }
limits = {}
log = { warn = "*console" }
certificates = "/run/measuring"
VirtualHost "vm.test"
    authentication = "insecure"
    insecure_open_authentication = "Yes please, I know what I'm doing!"
    ssl = { key = "/run/measuring/vm.test.key", certificate = "/run/measuring/vm.test.crt" }
