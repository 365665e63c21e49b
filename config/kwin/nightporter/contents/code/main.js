// Tells Night Porter which apps are looked at (org.nightporter1.App.SetStateOf), on Plasma 5 and 6.
//
// For KWin, whose window protocol is not open to a daemon of the system. Installed as
// /usr/share/kwin/scripts/nightporter, or by `kpackagetool6 --type KWin/Script --install config/kwin/nightporter`
// and switched on in System Settings, Window Management, KWin Scripts.
//
// An app is named by its windows' desktop file. It is in the background when nothing can be seen of any of its windows, or
// when its last one is closed; what this script never saw a window of it says nothing of.

const SERVICE = "org.nightporter1";
const PATH = "/org/nightporter1";
const INTERFACE = "org.nightporter1.App";

// What was said of each app.
const told = new Map();

function windows() {
    return typeof workspace.windowList === "function" ? workspace.windowList() : workspace.clientList();
}

function activeWindow() {
    return "activeWindow" in workspace ? workspace.activeWindow : workspace.activeClient;
}

// From the bottom. Plasma 5.27 does not tell it: there only what is minimized or on another desktop is hidden.
function stack() {
    return workspace.stackingOrder ? Array.from(workspace.stackingOrder) : [];
}

function onCurrentDesktop(window) {
    if (window.onAllDesktops) {
        return true;
    }
    // Plasma 6 has desktops as objects, 5.27 a number.
    if (typeof workspace.currentDesktop === "object") {
        return window.desktops.some((desktop) => desktop.id === workspace.currentDesktop.id);
    }
    return window.desktop === workspace.currentDesktop;
}

function contains(outer, inner) {
    return inner.x >= outer.x && inner.y >= outer.y &&
        inner.x + inner.width <= outer.x + outer.width && inner.y + inner.height <= outer.y + outer.height;
}

// Whether it is certain that nothing of the window can be seen.
function isHidden(window, order) {
    if (window === activeWindow()) {
        return false;
    }
    if (window.minimized || window.hidden || !onCurrentDesktop(window)) {
        return true;
    }
    const layer = order.indexOf(window);
    if (layer < 0) {
        return false;
    }
    return order.slice(layer + 1).some((above) =>
        (above.normalWindow || above.fullScreen) && !above.minimized && !above.hidden && !above.deleted &&
        onCurrentDesktop(above) && above.opacity === 1 && contains(above.frameGeometry, window.frameGeometry) &&
        (above.fullScreen || above === activeWindow()));
}

function nameOf(window) {
    return String(window.desktopFileName || "").replace(/\.desktop$/, "");
}

function tell(app, state) {
    if (told.get(app) !== state) {
        told.set(app, state);
        callDBus(SERVICE, PATH, INTERFACE, "SetStateOf", app, state);
    }
}

function look(without) {
    const order = stack();
    const states = new Map();
    for (const window of windows()) {
        const app = nameOf(window);
        if (window === without || window.specialWindow || !app.includes(".")) {
            continue;
        }
        if (!isHidden(window, order)) {
            states.set(app, "foreground");
        } else if (!states.has(app)) {
            states.set(app, "background");
        }
    }
    // Who comes to the front first: it may have to be woken.
    for (const state of ["foreground", "background"]) {
        for (const [app, its] of states) {
            if (its === state) {
                tell(app, state);
            }
        }
    }
    for (const app of Array.from(told.keys())) {
        if (!states.has(app)) {
            tell(app, "background");
            // Bounded by what is open; of an app that is opened again everything is news.
            told.delete(app);
        }
    }
}

function follow(window) {
    const signals = [
        "minimizedChanged", "clientMinimized", "clientUnminimized", "desktopsChanged", "desktopChanged",
        "desktopFileNameChanged", "fullScreenChanged", "frameGeometryChanged", "opacityChanged",
        "activeChanged", "hiddenChanged",
    ];
    for (const name of signals) {
        if (window[name] && typeof window[name].connect === "function") {
            window[name].connect(() => look());
        }
    }
}

function connect(names, handler) {
    for (const name of names) {
        if (workspace[name] && typeof workspace[name].connect === "function") {
            workspace[name].connect(handler);
            return;
        }
    }
}

connect(["windowAdded", "clientAdded"], (window) => { follow(window); look(); });
connect(["windowRemoved", "clientRemoved"], (window) => look(window));
connect(["windowActivated", "clientActivated"], () => look());
connect(["currentDesktopChanged"], () => look());
connect(["stackingOrderChanged"], () => look());
for (const window of windows()) {
    follow(window);
}
look();
