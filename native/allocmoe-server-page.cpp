#include "allocmoe-server-page.h"

#include "server-http.h"

// allocmoe-server-page.html, made by CMake
extern const unsigned char allocmoe_page_data[];
extern const unsigned long allocmoe_page_size;

void allocmoe_server_page(const server_http_context & http) {
    http.get("/budget", [](const server_http_req &) {
        auto res                                = std::make_unique<server_http_res>();
        res->content_type                       = "text/html; charset=utf-8";
        res->data                               = std::string((const char *) allocmoe_page_data, allocmoe_page_size);
        res->headers["Cache-Control"]           = "no-cache";
        res->headers["Content-Security-Policy"] = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'";
        return res;
    });
}
