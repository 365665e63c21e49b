/* An app that sleeps well: docs/lifecycle.md in C, with sd-bus (Debian: libsystemd-dev).
 *
 *     cc -Wall -Wextra -o app app.c $(pkg-config --cflags --libs libsystemd)
 *     ./app org.example.App
 *
 * It registers for push, says that it is in the background, saves what it knows when it is about to be frozen, and has it
 * back when a push starts it again. What it knows is how many messages it has seen. An app with windows says "foreground"
 * when one is shown, and "background" when the last is hidden.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-bus.h>

#define DISTRIBUTOR "org.unifiedpush.Distributor.nightporter"
#define PORTER "org.nightporter1"
/* Any text of at most 100 bytes that is the same at each start. An app with several accounts has one for each. */
#define TOKEN "messages"

struct app {
    const char *name;
    uint64_t seen;
    int restored;
};

/* Calls org.nightporter1.App. */
#define PORTER_CALL(bus, member, reply, ...) \
    sd_bus_call_method(bus, PORTER, "/org/nightporter1", "org.nightporter1.App", member, &error, reply, __VA_ARGS__)

static int fail(const char *what, sd_bus_error *error, int r)
{
    fprintf(stderr, "%s: %s\n", what, sd_bus_error_is_set(error) ? error->message : strerror(-r));
    sd_bus_error_free(error);
    return r;
}

/* Finds the text, or the bytes, of a key in an a{sv}; the message is left where it was. */
static int find(sd_bus_message *m, const char *key, const char *type, const void **value, size_t *size)
{
    const char *found;
    int r = sd_bus_message_rewind(m, 1);
    if (r >= 0)
        r = sd_bus_message_enter_container(m, 'a', "{sv}");
    *value = NULL;
    while (r >= 0 && (r = sd_bus_message_enter_container(m, 'e', "sv")) > 0) {
        r = sd_bus_message_read(m, "s", &found);
        if (r < 0)
            break;
        if (strcmp(found, key) != 0) {
            r = sd_bus_message_skip(m, "v");
        } else if ((r = sd_bus_message_enter_container(m, 'v', type)) >= 0) {
            r = size ? sd_bus_message_read_array(m, 'y', value, size) : sd_bus_message_read(m, "s", value);
            if (r >= 0)
                r = sd_bus_message_exit_container(m);
        }
        if (r >= 0)
            r = sd_bus_message_exit_container(m);
    }
    return r < 0 ? r : *value != NULL;
}

static int on_message(sd_bus_message *m, void *data, sd_bus_error *error)
{
    struct app *app = data;
    const void *body, *id;
    size_t size;
    int r = find(m, "message", "ay", &body, &size);
    if (r <= 0)
        return r < 0 ? r : sd_bus_error_set(error, SD_BUS_ERROR_INVALID_ARGS, "message (ay) is missing");
    app->seen++;
    printf("message %" PRIu64 ": %.*s\n", app->seen, (int)size, (const char *)body);
    /* The answer says that the message is this app's own now. An app that shows notifications shows it first. */
    r = find(m, "id", "s", &id, NULL);
    if (r < 0)
        return r;
    return r ? sd_bus_reply_method_return(m, "a{sv}", 1, "id", "s", (const char *)id)
             : sd_bus_reply_method_return(m, "a{sv}", 0);
}

static int on_endpoint(sd_bus_message *m, void *data, sd_bus_error *error)
{
    const void *endpoint;
    int r = find(m, "endpoint", "s", &endpoint, NULL);
    (void)data;
    if (r <= 0)
        return r < 0 ? r : sd_bus_error_set(error, SD_BUS_ERROR_INVALID_ARGS, "endpoint (s) is missing");
    /* To be sent to the app's own server, which pushes to it from now on. */
    printf("endpoint: %s\n", (const char *)endpoint);
    return sd_bus_reply_method_return(m, "a{sv}", 0);
}

static int on_unregistered(sd_bus_message *m, void *data, sd_bus_error *error)
{
    (void)data, (void)error;
    printf("unregistered\n");
    return sd_bus_reply_method_return(m, "a{sv}", 0);
}

static int save(sd_bus *bus, const struct app *app)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *call = NULL;
    char state[32];
    int length = snprintf(state, sizeof state, "%" PRIu64, app->seen);
    int r = sd_bus_message_new_method_call(bus, &call, PORTER, "/org/nightporter1", "org.nightporter1.App", "SaveState");
    if (r >= 0)
        r = sd_bus_message_append_array(call, 'y', state, (size_t)length);
    /* Answered when it is on the disk. */
    if (r >= 0)
        r = sd_bus_call(bus, call, 4000000, &error, NULL);
    sd_bus_message_unref(call);
    return r < 0 ? fail("SaveState", &error, r) : 0;
}

static int on_will_suspend(sd_bus_message *m, void *data, sd_bus_error *error)
{
    uint64_t milliseconds;
    int r = sd_bus_message_read(m, "t", &milliseconds);
    (void)error;
    if (r < 0)
        return r;
    /* With the answer, or when the time is over, nothing runs here any more: so what matters is saved before. This is also
     * the moment to tell one's server that it must push from now on. */
    printf("freezing, within %" PRIu64 " ms\n", milliseconds);
    r = save(sd_bus_message_get_bus(m), data);
    return r < 0 ? r : sd_bus_reply_method_return(m, NULL);
}

static int on_resumed(sd_bus_message *m, void *data, sd_bus_error *error)
{
    uint64_t milliseconds;
    int r = sd_bus_message_read(m, "t", &milliseconds);
    (void)data, (void)error;
    if (r < 0)
        return r;
    /* Timers that were due meanwhile run now. Connections of one's own are to be looked at after this long. */
    printf("resumed after %" PRIu64 " ms\n", milliseconds);
    return sd_bus_reply_method_return(m, NULL);
}

static const sd_bus_vtable connector[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD("Message", "a{sv}", "a{sv}", on_message, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("NewEndpoint", "a{sv}", "a{sv}", on_endpoint, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("Unregistered", "a{sv}", "a{sv}", on_unregistered, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_VTABLE_END,
};

static const sd_bus_vtable client[] = {
    SD_BUS_VTABLE_START(0),
    SD_BUS_METHOD("WillSuspend", "t", "", on_will_suspend, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_METHOD("Resumed", "t", "", on_resumed, SD_BUS_VTABLE_UNPRIVILEGED),
    SD_BUS_VTABLE_END,
};

static int restore(sd_bus *bus, struct app *app)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *reply = NULL;
    const void *state;
    size_t size;
    char text[32] = "";
    int r = PORTER_CALL(bus, "RestoreState", &reply, NULL);
    if (r >= 0)
        r = sd_bus_message_read_array(reply, 'y', &state, &size);
    if (r >= 0) {
        if (size > 0)
            memcpy(text, state, size < sizeof text ? size : sizeof text - 1);
        /* A message may have been faster. */
        app->seen += strtoull(text, NULL, 10);
        app->restored = 1;
        printf("restored: %" PRIu64 "\n", app->seen);
    }
    sd_bus_message_unref(reply);
    return r < 0 ? fail("RestoreState", &error, r) : 0;
}

/* Registers, and says what this app is and wants. Most of this is for registered apps only, so that comes first. */
static int greet(sd_bus *bus, struct app *app)
{
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus_message *reply = NULL;
    const void *result = NULL;
    int r = sd_bus_call_method(bus, DISTRIBUTOR, "/org/unifiedpush/Distributor", "org.unifiedpush.Distributor2", "Register",
                               &error, &reply, "a{sv}", 3, "service", "s", app->name, "token", "s", TOKEN, "description",
                               "s", "Messages");
    if (r < 0)
        return fail("Register", &error, r);
    r = find(reply, "success", "s", &result, NULL);
    if (r <= 0 || strcmp(result, "REGISTRATION_SUCCEEDED") != 0) {
        fprintf(stderr, "not registered: %s\n", r > 0 ? (const char *)result : "no result");
        sd_bus_message_unref(reply);
        return r < 0 ? r : -EACCES;
    }
    sd_bus_message_unref(reply);
    if (!app->restored && (r = restore(bus, app)) < 0)
        return r;
    r = PORTER_CALL(bus, "Listen", NULL, "b", 1);
    if (r < 0)
        return fail("Listen", &error, r);
    r = PORTER_CALL(bus, "SetState", NULL, "s", "background");
    if (r < 0)
        return fail("SetState", &error, r);
    printf("ready\n");
    return 0;
}

/* The daemon may be started anew (an update) and then knows nothing of what this instance has said. */
static int on_porter(sd_bus_message *m, void *data, sd_bus_error *error)
{
    const char *name, *before, *now;
    int r = sd_bus_message_read(m, "sss", &name, &before, &now);
    (void)error;
    return r >= 0 && *now ? greet(sd_bus_message_get_bus(m), data) : r;
}

int main(int argc, char **argv)
{
    struct app app = { 0 };
    sd_bus_error error = SD_BUS_ERROR_NULL;
    sd_bus *bus = NULL;
    int r;
    if (argc != 2) {
        fprintf(stderr, "usage: app BUS-NAME\n");
        return 64;
    }
    app.name = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    /* First what can be called, then the name it is called by: a message may come at once. */
    if ((r = sd_bus_open_user(&bus)) < 0 ||
        (r = sd_bus_add_object_vtable(bus, NULL, "/org/unifiedpush/Connector", "org.unifiedpush.Connector2", connector,
                                      &app)) < 0 ||
        (r = sd_bus_add_object_vtable(bus, NULL, "/org/nightporter1/Client", "org.nightporter1.Client", client, &app)) < 0 ||
        (r = sd_bus_add_match(bus, NULL,
                              "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
                              "member='NameOwnerChanged',arg0='" PORTER "'",
                              on_porter, &app)) < 0 ||
        (r = sd_bus_request_name(bus, app.name, 0)) < 0)
        return fail(app.name, &error, r), 1;
    if (greet(bus, &app) < 0)
        return 1;
    for (;;) {
        r = sd_bus_process(bus, NULL);
        if (r == 0)
            r = sd_bus_wait(bus, UINT64_MAX);
        if (r < 0)
            return fail("the bus", &error, r), 1;
    }
}
