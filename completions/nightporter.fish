# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_nightporter_global_optspecs
    string join \n user system h/help V/version
end

function __fish_nightporter_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_nightporter_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_nightporter_using_subcommand
    set -l cmd (__fish_nightporter_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c nightporter -n "__fish_nightporter_needs_command" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_needs_command" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_needs_command" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_needs_command" -s V -l version -d 'Print version'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "status" -d 'Show the upstream connections, the buses served and the message counts'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "apps" -d 'List all apps with their lifecycle state'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "show" -d 'Show one app in full: state, process, registrations, memory'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "why" -d 'Show the last decisions about an app, each with its reason'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "log" -d 'Show the latest decisions about all apps, or one, each with its reason'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "freeze" -d 'Freeze an app now'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "thaw" -d 'Let a frozen app run now'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "kill" -d 'End an app now; the next push starts it again'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "leases" -d 'List the leases that keep apps awake in the background'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "end-lease" -d 'Take a lease away from the app that holds it'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "move" -d 'Have an app, or all apps, reached through another push server from now on'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "forget-user" -d 'Forget all registrations, waiting messages and choices of a user whose account is gone'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "push" -d 'Send a test message to an app through its real push server'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "report" -d 'Measure now what the apps cost, and what is saved'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "doctor" -d 'Say what this machine offers and lacks, what the daemon does instead, and what mends it'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "demo" -d 'Run the whole main job on a private bus, with real processes, and show what it saves'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "measure" -d 'Measure what the daemon saves, in an experiment with the same apps run with it and without'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "measure-ballast" -d 'The child of the ballast test'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "completions" -d 'Print a completion script for a shell'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "man" -d 'Print the manual page'
complete -c nightporter -n "__fish_nightporter_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c nightporter -n "__fish_nightporter_using_subcommand status" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand status" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand status" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand status" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand apps" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand apps" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand apps" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand apps" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand show" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand show" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand show" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand show" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand why" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand why" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand why" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand why" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand log" -s f -l follow -d 'Go on showing what is decided, until interrupted'
complete -c nightporter -n "__fish_nightporter_using_subcommand log" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand log" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand log" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand log" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand freeze" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand freeze" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand freeze" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand freeze" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand thaw" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand thaw" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand thaw" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand thaw" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand kill" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand kill" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand kill" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand kill" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand leases" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand leases" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand leases" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand leases" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand end-lease" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand end-lease" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand end-lease" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand end-lease" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand move" -l all -d 'Move all apps, and those to come'
complete -c nightporter -n "__fish_nightporter_using_subcommand move" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand move" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand move" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand move" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand forget-user" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand forget-user" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand forget-user" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -l registration -d 'Which registration to send to, where the app has several' -r
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -l ca-file -d 'Trust the certificates in this PEM file instead of the system\'s' -r -F
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand push" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand report" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand report" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand report" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand report" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand doctor" -l json -d 'Print JSON instead of text'
complete -c nightporter -n "__fish_nightporter_using_subcommand doctor" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand doctor" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l apps -d 'How many apps to run' -r
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l json -d 'Write the figures to this file as JSON' -r -F
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l app-command -d 'Run this program as the app instead of nightporter-sample (see --help)' -r
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l messages -d 'How many pushes to send to each app in each state' -r
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand demo" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l json -d 'Write all figures and all raw samples to this file as JSON' -r -F
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l markdown -d 'Write the figures to this file as a section of Markdown' -r -F
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l reach -d 'Find out how many apps can be kept reachable, instead of measuring the arms'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l check -d 'Check the file, say what would be done, and do nothing'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure-ballast" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure-ballast" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand measure-ballast" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand completions" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand completions" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand completions" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand man" -l user -d 'Ask the daemon on the session bus (`nightporterd --user`)'
complete -c nightporter -n "__fish_nightporter_using_subcommand man" -l system -d 'Ask the daemon on the system bus'
complete -c nightporter -n "__fish_nightporter_using_subcommand man" -s h -l help -d 'Print help'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "status" -d 'Show the upstream connections, the buses served and the message counts'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "apps" -d 'List all apps with their lifecycle state'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "show" -d 'Show one app in full: state, process, registrations, memory'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "why" -d 'Show the last decisions about an app, each with its reason'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "log" -d 'Show the latest decisions about all apps, or one, each with its reason'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "freeze" -d 'Freeze an app now'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "thaw" -d 'Let a frozen app run now'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "kill" -d 'End an app now; the next push starts it again'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "leases" -d 'List the leases that keep apps awake in the background'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "end-lease" -d 'Take a lease away from the app that holds it'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "move" -d 'Have an app, or all apps, reached through another push server from now on'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "forget-user" -d 'Forget all registrations, waiting messages and choices of a user whose account is gone'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "push" -d 'Send a test message to an app through its real push server'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "report" -d 'Measure now what the apps cost, and what is saved'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "doctor" -d 'Say what this machine offers and lacks, what the daemon does instead, and what mends it'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "demo" -d 'Run the whole main job on a private bus, with real processes, and show what it saves'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "measure" -d 'Measure what the daemon saves, in an experiment with the same apps run with it and without'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "measure-ballast" -d 'The child of the ballast test'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "completions" -d 'Print a completion script for a shell'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "man" -d 'Print the manual page'
complete -c nightporter -n "__fish_nightporter_using_subcommand help; and not __fish_seen_subcommand_from status apps show why log freeze thaw kill leases end-lease move forget-user push report doctor demo measure measure-ballast completions man help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
