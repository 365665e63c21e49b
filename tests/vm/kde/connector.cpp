// An app of KDE's kind: all it knows of push is KDE's own library, KUnifiedPush. It reports to the test what the library
// tells it, each thing a datagram.
//
// usage: connector NAME
#include <kunifiedpush/connector.h>

#include <QCoreApplication>
#include <QDBusConnection>
#include <QJsonDocument>
#include <QJsonObject>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <string>

using KUnifiedPush::Connector;

namespace {

QString name;

void report(QJsonObject event)
{
    static const int out = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_un to{AF_UNIX, "/run/sample-reports"};
    event.insert(QStringLiteral("app"), name);
    event.insert(QStringLiteral("uid"), int(getuid()));
    const QByteArray line = QJsonDocument(event).toJson(QJsonDocument::Compact);
    sendto(out, line.constData(), line.size(), 0, reinterpret_cast<sockaddr *>(&to), sizeof to);
}

// What a chat client remembers: 24 MiB of lines that are alike, as text is.
std::string history()
{
    std::string text;
    text.reserve(24 << 20);
    for (unsigned line = 1; text.size() < (24U << 20) - 100; ++line) {
        text += std::to_string(line * 2654435761U) + " is what somebody said to somebody else\n";
    }
    return text;
}

} // namespace

int main(int argc, char **argv)
{
    if (argc != 2) {
        return 64;
    }
    QCoreApplication app(argc, argv);
    name = QString::fromUtf8(argv[1]);
    const std::string remembered = history();
    Connector connector(name);
    QObject::connect(&connector, &Connector::messageReceived, [](const QByteArray &body) {
        report({{QStringLiteral("event"), QStringLiteral("message")}, {QStringLiteral("body"), QString::fromUtf8(body)}});
    });
    QObject::connect(&connector, &Connector::endpointChanged, [](const QString &endpoint) {
        report({{QStringLiteral("event"), QStringLiteral("endpoint")}, {QStringLiteral("endpoint"), endpoint}});
    });
    QObject::connect(&connector, &Connector::stateChanged, [&connector](Connector::State state) {
        if (state == Connector::Registered) {
            report({{QStringLiteral("event"), QStringLiteral("endpoint")}, {QStringLiteral("endpoint"), connector.endpoint()}});
            report({{QStringLiteral("event"), QStringLiteral("ready")}});
        } else {
            report({{QStringLiteral("event"), QStringLiteral("state")}, {QStringLiteral("state"), int(state)}});
        }
    });
    // The library's object is there; now the name is taken, as KDBusService does it.
    if (!QDBusConnection::sessionBus().registerService(name)) {
        return 1;
    }
    connector.registerClient(QStringLiteral("Messages"));
    const int status = QCoreApplication::exec();
    return status + int(remembered.empty());
}
